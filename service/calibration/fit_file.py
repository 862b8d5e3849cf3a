"""Fit a temperature to a file of logits and labels, as `POST /v1/calibration/fits` does with stored ones.

A row is a prediction: `engine_id`, `label` (class name, index, or in JSON a probability for each class) and its logits,
as `logits` in JSON lines or one column `logit_CLASS` for each class in CSV. Independent of HTTP and of the database.
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
        path: CSV or TSV by its extension, JSON lines otherwise.
        classes: names, in the order of the logits.
        temperature: the one that the fit is compared with.

    Raises:
        InvalidInput: the file cannot be read, or a row is malformed. The message has its line.
        InvalidInput: the rows give no better temperature. The message has the reason.
    """
    rows = read(path, tuple(classes))
    engine_ids = sorted(set(rows.engines))
    engine = np.searchsorted(engine_ids, rows.engines)
    try:
        return cross_validate_temperature(rows.logits, rows.labels, engine, temperature)
    except FitRefused as refused:
        raise InvalidInput(f"{path}: {refused}") from None


def read(path: Path, classes: tuple[str, ...]) -> FitFileRows:
    """Read the rows of a file.

    Raises:
        InvalidInput: as in `from_file`.
    """
    logits, labels, engines = [], [], []
    try:
        for line, row in _read_csv(path, classes) if path.suffix.lower() in CSV else _read_json(path):
            try:
                logits.append(_parse_logits(row.get("logits"), len(classes)))
                labels.append(_parse_label(row.get("label"), classes))
                engines.append(_parse_engine(row.get("engine_id")))
            except (ValueError, TypeError) as error:
                raise InvalidInput(f"{path}, line {line}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not logits:
        raise InvalidInput(f"{path}: no rows")
    return FitFileRows(np.array(logits), np.array(labels), engines)


def _read_csv(path: Path, classes: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        columns = [f"logit_{name}" for name in classes]
        missing = [name for name in ("engine_id", "label", *columns) if name not in (table.fieldnames or ())]
        if missing:
            raise InvalidInput(f"{path}: no column {missing[0]!r}")
        for row in table:
            yield table.line_num, row | {"logits": [row[name] for name in columns]}


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, msgspec.json.decode(line, type=dict[str, Any])
                except msgspec.MsgspecError as error:
                    raise InvalidInput(f"{path}, line {number}: {error}") from None


def _parse_logits(value: Any, classes: int) -> list[float]:
    if not isinstance(value, list) or len(value) != classes or any(isinstance(item, bool | None) for item in value):
        raise ValueError(f"expected {classes} logits")
    logits = [float(item) for item in value]
    if not all(map(math.isfinite, logits)):
        raise ValueError("a logit is not finite")
    return logits


def _parse_label(value: Any, classes: tuple[str, ...]) -> Floats:
    if isinstance(value, str) and value not in classes and value.isdecimal():
        value = int(value)  # CSV has no numbers, only text
    if isinstance(value, bool) or not isinstance(value, str | int | list):
        raise ValueError(f"expected a label, got {value!r:.40}")
    return label_distribution(value, classes)


def _parse_engine(value: Any) -> str:
    if value in (None, "") or isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("expected an engine_id")
    return str(value)


def lines(fit: TemperatureFit, temperature: float) -> Iterator[str]:
    """Yield the lines that describe a fit."""
    yield f"{fit.rows} labelled predictions of {fit.engines} engines"
    yield f"temperature {fit.temperature:.4f}, compared with {temperature:.4f}; measured on engines left out:"
    for name, change in (("cross-entropy", fit.cross_entropy), ("ECE", fit.ece)):
        low, high = change.interval
        interval = f"({change.difference:+.4f}, 90 % {low:+.4f} to {high:+.4f})"
        yield f"  {name:<14}{change.before:.4f} -> {change.after:.4f}  {interval}"
