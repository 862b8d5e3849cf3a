"""Turn chunks of columns into rows to score and rejected rows with their reasons."""

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
from service.scoring.readers import Chunk, read_chunks
from service.scoring.sources import Source

Integers = npt.NDArray[np.int64]
MAX_SHOWN_CHARACTERS = 40  # maximum length of an invalid value in a reason


class Reject(NamedTuple):
    """A row that is not scored: its position in the file, counted from 0, and the reason."""

    row: int
    file: str
    reason: str


@dataclass
class Rows:
    """Valid rows of one file: engine ids (N,) as Arrow strings, and arrays with their values."""

    engine_ids: Any
    cycle: Integers
    readings: npt.NDArray[np.float32]  # (N, C), NaN where a value is missing and is to be held
    label: Integers  # class index, -1 without a label
    row: Integers


class Layout:
    """Columns of a job: by name in most formats, by position in C-MAPSS text."""

    def __init__(self, options: Options, model: Model) -> None:
        self.options, self.classes, self.hold = options, model.manifest.classes, options.missing == "hold"
        self.channels = model.channels
        if model.input_shape not in ((len(self.channels),), (model.manifest.window, len(self.channels))):
            raise InvalidInput(
                f"{model.manifest.name}: its input {list(model.input_shape)} is not a window of named channels"
            )
        probabilities = (f"p_{name}" for name in self.classes)
        output_columns = {"health", "rul", "prediction_set", "expected_loss", "loss", *probabilities}
        for flag, name in (("--engine-column", options.engine_column), ("--cycle-column", options.cycle_column)):
            if name in output_columns:
                raise InvalidInput(
                    f"{flag} {name}: the output already has a column of this name; rename the column of the input"
                )
        unknown = sorted(set(options.columns) - set(self.channels))
        if unknown:
            raise InvalidInput(
                f"--map {unknown[0]}: the model has no such channel; expected one of {', '.join(self.channels)}"
            )
        thresholds = model.manifest.rul_thresholds
        if options.rul and thresholds is None:
            raise InvalidInput("--rul: the model has no RUL thresholds, so a RUL determines no class; use --labels")
        self.label_kind = "a RUL of at least 0" if options.rul else f"a class of {', '.join(self.classes[:20])}"
        self.parse_labels: Callable[[Any], tuple[Integers, columns.Mask]] = (
            (lambda column: columns.parse_rul_classes(column, lambda rul: health_classes(rul, thresholds or ())))
            if options.rul
            else (lambda column: columns.parse_classes(column, self.classes))
        )

    def read_rows(self, source: Source) -> Iterator[tuple[Rows, list[Reject], float]]:
        """Yield valid rows of a file, rejected rows, and the fraction of the file that is read so far.

        Raises:
            InvalidInput: as `readers.read_chunks`.
        """
        text = source.kind == "cmapss"
        engine = COLUMNS[0] if text else self.options.engine_column
        cycle = COLUMNS[1] if text else self.options.cycle_column
        readings = [name if text else self.options.columns.get(name, name) for name in self.channels]
        if text and not set(readings) <= set(COLUMNS):
            raise InvalidInput(f"{source.name}: C-MAPSS text does not have all channels of the model")
        labels = [] if self.options.truth_column is None else [self.options.truth_column]
        if text and labels:
            raise InvalidInput(f"{source.name}: C-MAPSS text has no column {labels[0]!r}")
        for chunk in read_chunks(source, list(dict.fromkeys([engine, cycle, *readings, *labels]))):
            yield *self._parse_chunk(chunk, source, engine, cycle, readings, labels), chunk.fraction

    def _parse_chunk(
        self, chunk: Chunk, source: Source, engine: str, cycle: str, readings: list[str], labels: list[str]
    ) -> tuple[Rows, list[Reject]]:
        reasons = _RejectReasons(chunk)
        engine_ids, invalid = columns.parse_engine_ids(chunk.columns[engine])
        reasons.add(invalid, partial(reasons.describe_engine_id, engine))
        cycles, invalid = columns.parse_cycles(chunk.columns[cycle])
        reasons.add(invalid, partial(reasons.describe_cycle, cycle))
        telemetry, not_numeric = columns.parse_readings([chunk.columns[name] for name in readings])
        not_usable = np.isinf(telemetry) if self.hold else ~np.isfinite(telemetry)
        if not_usable.any() or any(mask.any() for mask in not_numeric):
            for k, name in enumerate(readings):
                reasons.add(not_numeric[k], partial(reasons.describe_number, name))
                reasons.add(not_usable[:, k], partial(_describe_reading, name, telemetry[:, k]))
        label = np.full(chunk.rows, -1, dtype=np.int64)
        for name in labels:
            label, invalid = self.parse_labels(chunk.columns[name])
            reasons.add(invalid, partial(reasons.describe_label, name, self.label_kind))
        rows = Rows(engine_ids, cycles, telemetry, label, chunk.first + np.arange(chunk.rows))
        return self._split_rows(rows, reasons, source)

    def _split_rows(self, rows: Rows, reasons: "_RejectReasons", source: Source) -> tuple[Rows, list[Reject]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        if source.subset:
            rows.engine_ids = pc.binary_join_element_wise(pa.scalar(source.subset), rows.engine_ids, "-")
        rejected = [Reject(int(rows.row[i]), source.name, reason) for i, reason in sorted(reasons.by_row.items())]
        if not rejected:
            return rows, []
        valid = np.ones(len(rows.cycle), dtype=np.bool_)
        valid[list(reasons.by_row)] = False
        engine_ids = rows.engine_ids.filter(pa.array(valid))
        return Rows(engine_ids, rows.cycle[valid], rows.readings[valid], rows.label[valid], rows.row[valid]), rejected


class _RejectReasons:
    """First reason of each rejected row of a chunk."""

    def __init__(self, chunk: Chunk) -> None:
        self.by_row, self._columns = dict(chunk.reasons), chunk.columns

    def add(self, rejected: columns.Mask, describe: Callable[[int], str]) -> None:
        """Add reasons of rows that have none yet. `describe` returns the reason of a row."""
        for i in np.flatnonzero(rejected).tolist():
            if i not in self.by_row:
                self.by_row[i] = describe(i)

    def describe_engine_id(self, name: str, i: int) -> str:
        value = self._columns[name][i].as_py()
        if isinstance(value, str) and CONTROL_CHARACTER.search(value):
            return f"{name}: {faults.CONTROL_CHARACTERS}"
        return f"{name}: {faults.wrong_length(MAX_NAME_LENGTH, self._format_value(name, i))}"

    def describe_cycle(self, name: str, i: int) -> str:
        return f"{name}: expected a whole number from 0 to {MAX_CYCLE}, got {self._format_value(name, i)}"

    def describe_number(self, name: str, i: int) -> str:
        return f"{name}: expected a number, got {self._format_value(name, i)}"

    def describe_label(self, name: str, label_kind: str, i: int) -> str:
        return f"{name}: expected {label_kind}, got {self._format_value(name, i)}"

    def _format_value(self, name: str, i: int) -> str:
        """Return an invalid value, shortened."""
        value = self._columns[name][i].as_py()
        return "nothing" if value is None else repr(value)[:MAX_SHOWN_CHARACTERS]


def _describe_reading(name: str, column: npt.NDArray[np.float32], i: int) -> str:
    return f"{name}: {faults.missing_reading('--missing hold') if np.isnan(column[i]) else faults.TOO_LARGE}"
