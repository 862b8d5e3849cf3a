"""A temperature fitted to a file of logits and truths: what `POST /v1/calibration/fits` does, without a service.

A row is a prediction: `engine_id`, `label` (class name, index, or in JSON a probability for each class) and its logits,
as `logits` in JSON lines or one column `logit_CLASS` for each class in CSV. Knows files, no HTTP and no database.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from model.evaluation.temperature_fit import FitRefused, TemperatureFit, cross_validate_temperature
from model.numerics import Floats
from service.codecs.labels import label_distribution
from service.errors import InvalidInput

CSV = (".csv", ".tsv")


class FitFileRows(NamedTuple):
    """Logits and labels (N, C), and the engine of each row (N,)."""

    logits: Floats
    labels: Floats
    engines: list[str]


def from_file(path: Path, classes: Sequence[str], temperature: float) -> TemperatureFit:
    """Fit a temperature to a file.

    Args:
        path: CSV or TSV by its ending, JSON lines otherwise.
        classes: names, in the order of the logits.
        temperature: what the fit is compared with.

    Raises:
        InvalidInput: the file cannot be read, or a row is wrong; names its line.
        InvalidInput: there is no better temperature in it; says why.
    """
    rows = read(path, tuple(classes))
    names = sorted(set(rows.engines))
    engine = np.searchsorted(names, rows.engines)
    try:
        return cross_validate_temperature(rows.logits, rows.labels, engine, temperature)
    except FitRefused as refused:
        raise InvalidInput(f"{path}: {refused}") from None


def read(path: Path, classes: tuple[str, ...]) -> FitFileRows:
    """The rows of a file.

    Raises:
        InvalidInput: as in `from_file`.
    """
    logits, labels, engines = [], [], []
    try:
        for line, row in _csv(path, classes) if path.suffix.lower() in CSV else _json(path):
            try:
                logits.append(_logits(row.get("logits"), len(classes)))
                labels.append(_label(row.get("label"), classes))
                engines.append(_engine(row.get("engine_id")))
            except (ValueError, TypeError) as error:
                raise InvalidInput(f"{path}, line {line}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not logits:
        raise InvalidInput(f"{path}: no rows")
    return FitFileRows(np.array(logits), np.array(labels), engines)


def _csv(path: Path, classes: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        columns = [f"logit_{name}" for name in classes]
        missing = [name for name in ("engine_id", "label", *columns) if name not in (table.fieldnames or ())]
        if missing:
            raise InvalidInput(f"{path}: no column {missing[0]!r}")
        for row in table:
            yield table.line_num, row | {"logits": [row[name] for name in columns]}


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, msgspec.json.decode(line, type=dict[str, Any])
                except msgspec.MsgspecError as error:
                    raise InvalidInput(f"{path}, line {number}: {error}") from None


def _logits(given: Any, classes: int) -> list[float]:
    if not isinstance(given, list) or len(given) != classes or any(isinstance(one, bool | None) for one in given):
        raise ValueError(f"expected {classes} logits")
    found = [float(one) for one in given]
    if not all(map(math.isfinite, found)):
        raise ValueError("a logit is not finite")
    return found


def _label(given: Any, classes: tuple[str, ...]) -> Floats:
    if isinstance(given, str) and given not in classes and given.isdecimal():
        given = int(given)  # CSV knows no numbers
    if isinstance(given, bool) or not isinstance(given, str | int | list):
        raise ValueError(f"expected a label, got {given!r:.40}")
    return label_distribution(given, classes)


def _engine(given: Any) -> str:
    if given in (None, "") or isinstance(given, bool) or not isinstance(given, str | int):
        raise ValueError("expected an engine_id")
    return str(given)


def lines(found: TemperatureFit, temperature: float) -> Iterator[str]:
    """A fit in words."""
    yield f"{found.rows} labelled predictions of {found.engines} engines"
    yield f"temperature {found.temperature:.4f}, compared with {temperature:.4f}; measured on engines left out:"
    for name, change in (("cross-entropy", found.cross_entropy), ("ECE", found.ece)):
        low, high = change.interval
        sure = f"({change.difference:+.4f}, 90 % {low:+.4f} to {high:+.4f})"
        yield f"  {name:<14}{change.before:.4f} -> {change.after:.4f}  {sure}"
