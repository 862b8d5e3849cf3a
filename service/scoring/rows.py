"""Chunks of columns to rows that can be scored, and the rejected ones with their reasons. Knows columns, no files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.data.cmapss import COLUMNS, health_classes
from service.codecs import faults
from service.codecs.requests import CONTROL_CHARACTER, MAX_CYCLE, MAX_NAME_LENGTH
from service.errors import InvalidInput
from service.inference.onnx_model import Model
from service.scoring import columns
from service.scoring.options import Options
from service.scoring.readers import Chunk, chunks
from service.scoring.sources import Source

Integers = npt.NDArray[np.int64]
SHOWN = 40  # characters of a wrong value


class Reject(NamedTuple):
    """A row without an answer: where it stands, counted from 0, and why."""

    row: int
    file: str
    reason: str


@dataclass
class Rows:
    """Rows of one file, all of them fit: engine ids (N,) in Arrow, and what stands there. A label of -1 is none."""

    names: Any
    cycle: Integers
    readings: npt.NDArray[np.float32]  # (N, C), NaN where a value is missing and shall be held
    label: Integers
    row: Integers


class Layout:
    """Where the columns of a job stand: under their names in most files, by place in C-MAPSS text."""

    def __init__(self, options: Options, model: Model) -> None:
        self.options, self.classes, self.hold = options, model.manifest.classes, options.missing == "hold"
        self.channels = model.channels
        if model.input_shape not in ((len(self.channels),), (model.manifest.window, len(self.channels))):
            raise InvalidInput(
                f"{model.manifest.name}: its input {list(model.input_shape)} is no window of named channels"
            )
        made = {"health", "rul", "prediction_set", "expected_loss", "loss", *(f"p_{name}" for name in self.classes)}
        for flag, name in (("--engine-column", options.engine_column), ("--cycle-column", options.cycle_column)):
            if name in made:
                raise InvalidInput(f"{flag} {name}: the output has a column of its own of this name")
        unknown = sorted(set(options.columns) - set(self.channels))
        if unknown:
            raise InvalidInput(f"--map {unknown[0]}: this model has no such channel; it has {', '.join(self.channels)}")
        thresholds = model.manifest.rul_thresholds
        if options.rul and thresholds is None:
            raise InvalidInput("--rul: this model knows no RUL, so that no class follows from it")
        self.what = "true RUL" if options.rul else f"class among {', '.join(self.classes[:20])}"
        self.truth: Callable[[Any], tuple[Integers, columns.Mask]] = (
            (lambda column: columns.classes_of_rul(column, lambda rul: health_classes(rul, thresholds or ())))
            if options.rul
            else (lambda column: columns.classes(column, self.classes))
        )

    def read(self, source: Source) -> Iterator[tuple[Rows, list[Reject], float]]:
        """The rows of a file, those that are rejected, and the fraction of the file that is read with them.

        Raises:
            InvalidInput: as `readers.chunks`.
        """
        text = source.kind == "cmapss"
        engine = COLUMNS[0] if text else self.options.engine_column
        cycle = COLUMNS[1] if text else self.options.cycle_column
        readings = [name if text else self.options.columns.get(name, name) for name in self.channels]
        if text and not set(readings) <= set(COLUMNS):
            raise InvalidInput(f"{source.name}: C-MAPSS text does not hold this model's channels")
        truth = [] if self.options.truth_column is None else [self.options.truth_column]
        if text and truth:
            raise InvalidInput(f"{source.name}: C-MAPSS text has no column {truth[0]!r}")
        for chunk in chunks(source, list(dict.fromkeys([engine, cycle, *readings, *truth]))):
            yield *self._checked(chunk, source, engine, cycle, readings, truth), chunk.fraction

    def _checked(
        self, chunk: Chunk, source: Source, engine: str, cycle: str, readings: list[str], truth: list[str]
    ) -> tuple[Rows, list[Reject]]:
        found = _Reasons(chunk)
        names, wrong = columns.names(chunk.columns[engine])
        found.add(wrong, partial(found.no_name, engine))
        at, wrong = columns.cycles(chunk.columns[cycle])
        found.add(wrong, lambda i: f"{cycle}: {found.shown(cycle, i)} is not a whole number from 0 to {MAX_CYCLE}")
        telemetry, no_number = columns.readings([chunk.columns[name] for name in readings])
        unfit = np.isinf(telemetry) if self.hold else ~np.isfinite(telemetry)
        if unfit.any() or any(wrong.any() for wrong in no_number):
            for k, name in enumerate(readings):
                found.add(no_number[k], partial(found.no_number, name))
                found.add(unfit[:, k], partial(_unfit, name, telemetry[:, k]))
        label = np.full(chunk.rows, -1, dtype=np.int64)
        for name in truth:
            label, wrong = self.truth(chunk.columns[name])
            found.add(wrong, partial(found.untrue, name, self.what))
        return self._split(Rows(names, at, telemetry, label, chunk.first + np.arange(chunk.rows)), found, source)

    def _split(self, rows: Rows, found: "_Reasons", source: Source) -> tuple[Rows, list[Reject]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        if source.subset:
            rows.names = pc.binary_join_element_wise(pa.scalar(source.subset), rows.names, "-")
        rejected = [Reject(int(rows.row[i]), source.name, reason) for i, reason in sorted(found.reasons.items())]
        if not rejected:
            return rows, []
        fit = np.ones(len(rows.cycle), dtype=np.bool_)
        fit[list(found.reasons)] = False
        kept = rows.names.filter(pa.array(fit))
        return Rows(kept, rows.cycle[fit], rows.readings[fit], rows.label[fit], rows.row[fit]), rejected


class _Reasons:
    """The first reason of each row of a chunk."""

    def __init__(self, chunk: Chunk) -> None:
        self.reasons, self._columns = dict(chunk.reasons), chunk.columns

    def add(self, wrong: columns.Mask, reason: Callable[[int], str]) -> None:
        for i in np.flatnonzero(wrong).tolist():
            if i not in self.reasons:
                self.reasons[i] = reason(i)

    def no_name(self, name: str, i: int) -> str:
        value = self._columns[name][i].as_py()
        if isinstance(value, str) and CONTROL_CHARACTER.search(value):
            return f"{name}: {faults.CONTROL_CHARACTERS}"
        return f"{name}: {faults.wrong_length(MAX_NAME_LENGTH, self.shown(name, i))}"

    def no_number(self, name: str, i: int) -> str:
        return f"{name}: expected a number, got {self.shown(name, i)}"

    def untrue(self, name: str, what: str, i: int) -> str:
        return f"{name}: {self.shown(name, i)} is no {what}"

    def shown(self, name: str, i: int) -> str:
        """A wrong value, in short."""
        value = self._columns[name][i].as_py()
        return "nothing" if value is None else repr(value)[:SHOWN]


def _unfit(name: str, column: npt.NDArray[np.float32], i: int) -> str:
    return f"{name}: {faults.missing_reading('--missing hold') if np.isnan(column[i]) else faults.TOO_LARGE}"
