"""Decode an Arrow table of flights into instances: the rows of one engine, by cycle, are one. Independent of HTTP."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model import windows
from service.codecs.arrow import ARROW, INTEGERS, NULLS, NUMBERS, TEXTS, ArrowTable, Column
from service.codecs.faults import (
    CONTROL_CHARACTERS,
    MAX_FAULTS,
    MISSING,
    MISSING_CHANNEL,
    TOO_LARGE,
    Loc,
    missing_reading,
    refuse,
    wrong_length,
)
from service.codecs.instances import DecodedInstances
from service.codecs.labels import decode_labels
from service.codecs.missing_values import hold_window
from service.codecs.requests import CONTROL_CHARACTER, MAX_CYCLE, MAX_NAME_LENGTH, Label
from service.errors import Fault, UnsupportedMediaType
from service.inference.onnx_model import Batch, Model

ENGINE, CYCLE, LABEL = "engine_id", "cycle", "label"
KEY_COLUMNS = {  # columns that are not channels: a description of their values, and their types
    ENGINE: ("strings", TEXTS),
    CYCLE: ("integers", INTEGERS),
    LABEL: ("class names or indices", (*TEXTS, *INTEGERS, NULLS)),
}
RowIndices = npt.NDArray[np.int64]


@dataclass
class InstanceKey:
    """The engine and the newest cycle of an instance."""

    engine_id: str | None
    cycle: int | None


@dataclass
class TableInstances:
    """The instances of a table: the rows of instance i are `order[bounds[i] : bounds[i + 1]]`, oldest first."""

    columns: dict[str, Column]
    keys: list[InstanceKey]
    order: RowIndices | None  # (rows,), None if the table is in this order already
    bounds: RowIndices  # (N + 1,)

    @property
    def newest(self) -> RowIndices:
        """Return the newest row of each instance (N,)."""
        last = self.bounds[1:] - 1
        return last if self.order is None else self.order[last]


def group_instances(table: ArrowTable, model: Model) -> TableInstances:
    """Return the instances of a table, in the order in which engines first appear.

    With a window, the rows of one engine, by cycle, are one instance; without a column of engines, the whole table is.
    Without a window, each row is an instance.

    Raises:
        UnsupportedMediaType: the model's input is neither a row of named channels nor a window of such rows.
        InvalidInput: a wrong column or value, with its column and row.
    """
    window, channels = model.manifest.window, model.channels
    if not channels or model.input_shape not in ((len(channels),), (window, len(channels))):
        raise UnsupportedMediaType(f"{ARROW}: this model's input {list(model.input_shape)} has no named channels")
    _check_columns(table, channels)
    columns = {column.name: column for column in table.columns}
    names, engine = _read_engines(columns, table.rows)
    cycle = _read_cycles(columns, table.rows)
    if window is None:
        keys = [InstanceKey(names[k], None) for k in engine.tolist()]
        instances = TableInstances(columns, keys, None, np.arange(table.rows + 1))
    else:
        bounds = np.concatenate([[0], np.cumsum(np.bincount(engine))])
        keys = [InstanceKey(name, None) for name in names]
        instances = TableInstances(columns, keys, _sort_rows(engine, cycle), bounds)
    if CYCLE in columns:
        for key, newest in zip(instances.keys, cycle[instances.newest].tolist(), strict=True):
            key.cycle = newest
    return instances


def _check_columns(table: ArrowTable, channels: tuple[str, ...]) -> None:
    """Reject a table without a channel, or with a column that is unknown, a duplicate, or of the wrong type."""
    expected = dict.fromkeys(channels, ("numbers", NUMBERS)) | KEY_COLUMNS
    column_counts = Counter(column.name for column in table.columns)
    faults = [Fault((name,), MISSING_CHANNEL) for name in channels if name not in column_counts]
    for name, kind, _ in table.columns:
        if name not in expected:
            faults.append(Fault((name[:80],), "unknown column"))
        elif column_counts[name] > 1:
            faults.append(Fault((name,), "more than one column has this name"))
        elif kind not in expected[name][1]:
            faults.append(Fault((name,), f"expected a column of {expected[name][0]}, got {kind[:80]}"))
    if not (table.rows or faults):
        faults.append(Fault(("instances",), "the table has no rows"))
    refuse(faults)


def _read_engines(columns: dict[str, Column], rows: int) -> tuple[list[str | None], RowIndices]:
    """Return the names of the engines as they first appear, and the index of the engine of each row.

    Without a column of engines, all rows belong to one engine without a name.
    """
    if ENGINE not in columns:
        return [None], np.zeros(rows, np.int64)
    codes, texts = columns[ENGINE].texts()
    first_row = np.full(len(texts), rows)
    first_row[codes[::-1]] = np.arange(rows)[::-1]  # backwards: the last write for each code is its first row
    engine_of_code, engines = np.zeros(len(texts), np.int64), dict[str | None, int]()
    for row in np.sort(first_row[first_row < rows]).tolist():
        name = texts[codes[row]]
        if not name or len(name) > MAX_NAME_LENGTH:
            problem = MISSING if name is None else wrong_length(MAX_NAME_LENGTH, len(name))
            refuse([Fault((ENGINE, row), problem)])
        if CONTROL_CHARACTER.search(name):
            refuse([Fault((ENGINE, row), CONTROL_CHARACTERS)])
        engine_of_code[codes[row]] = engines.setdefault(name, len(engines))  # an Arrow dictionary may repeat a name
    return list(engines), engine_of_code[codes]


def _read_cycles(columns: dict[str, Column], rows: int) -> RowIndices:
    """Return the cycle of each row; without a column of cycles, its position in the table."""
    if CYCLE not in columns:
        return np.arange(rows)
    values, present = columns[CYCLE].numbers()
    wrong = np.flatnonzero(~present | (values < 0) | (values > MAX_CYCLE))[:MAX_FAULTS].tolist()
    problems = (f"{values[row]} is not from 0 to {MAX_CYCLE}" if present[row] else MISSING for row in wrong)
    refuse([Fault((CYCLE, row), problem) for row, problem in zip(wrong, problems, strict=True)])
    return values.astype(np.int64)


def _sort_rows(engine: RowIndices, cycle: RowIndices) -> RowIndices | None:
    """Return the row indices sorted by engine, then by cycle; None if the rows are sorted already.

    Raises:
        InvalidInput: two rows of the same engine and cycle.
    """
    same_engine = engine[1:] == engine[:-1]
    if ((engine[1:] > engine[:-1]) | (same_engine & (cycle[1:] > cycle[:-1]))).all():
        return None
    order = np.lexsort((cycle, engine))
    engine, cycle = engine[order], cycle[order]
    duplicates = np.flatnonzero((engine[1:] == engine[:-1]) & (cycle[1:] == cycle[:-1]))[:MAX_FAULTS].tolist()
    refuse([Fault(("instances", int(engine[i]), CYCLE), f"cycle {cycle[i]} occurs in two rows") for i in duplicates])
    return order


def decode_table(instances: TableInstances, model: Model, hold: bool) -> DecodedInstances:
    """Return the readings as padded windows, and the labels of the newest rows. With `hold`, fill missing readings.

    Raises:
        InvalidInput: wrong values, at most twenty, each with instance, row and channel.
    """
    window, channels = model.manifest.window, model.channels
    hold = hold and window is not None  # a single row has no earlier value
    readings = _read_channels(instances, channels)
    all_finite = bool(np.isfinite(readings).all())
    if not all_finite:
        _refuse_not_finite(readings, instances, channels, hold, window is None)
    faults: list[Fault] = []
    batch = np.empty((len(instances.keys), *model.input_shape), dtype=np.float32)
    imputed = np.zeros(len(channels), dtype=np.int64)
    for i, (begin, end) in enumerate(pairwise(instances.bounds.tolist())):
        history = readings[begin:end]
        rows: Batch | None = history
        if window is not None and not all_finite:  # then `hold` is set, otherwise they were rejected
            rows, held_counts = hold_window(history, window, channels, ("instances", i, "telemetry"), faults)
            imputed += held_counts
        if rows is not None:
            batch[i] = rows[0] if window is None else windows.pad_left(rows, window)
    labels = _read_labels(instances.columns.get(LABEL), instances.newest)
    targets = decode_labels(labels, model.manifest.classes, faults, lambda i: ("instances", i, LABEL))
    refuse(faults)
    return DecodedInstances(batch, targets, imputed if hold else None)


def _read_channels(instances: TableInstances, channels: tuple[str, ...]) -> Batch:
    """Return all readings (rows, channels) in the order of the instances, missing ones as NaN."""
    readings = np.empty((instances.bounds[-1], len(channels)), dtype=np.float32)
    for k, name in enumerate(channels):
        values, present = instances.columns[name].numbers()
        if values.dtype.kind in "iu":
            values = values.astype(np.float64)  # as JSON numbers are, so that both are rounded to the same float32
        with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are rejected later
            readings[:, k] = values
        readings[~present, k] = np.nan
    return readings if instances.order is None else readings[instances.order]


def _refuse_not_finite(
    readings: Batch, instances: TableInstances, channels: tuple[str, ...], hold: bool, single: bool
) -> None:
    """Reject readings that are infinite as float32, and missing ones if they are not held."""
    refused = np.isinf(readings) if hold else ~np.isfinite(readings)
    faults = []
    for row in np.flatnonzero(refused.any(axis=1))[:MAX_FAULTS].tolist():
        i = int(np.searchsorted(instances.bounds, row, side="right")) - 1
        loc: Loc = ("instances", i, "telemetry")
        if not single:
            loc = (*loc, row - int(instances.bounds[i]))
        for k in np.flatnonzero(refused[row]).tolist():
            missing = np.isnan(readings[row, k])
            faults.append(Fault((*loc, channels[k]), missing_reading("missing=hold") if missing else TOO_LARGE))
    refuse(faults)


def _read_labels(column: Column | None, rows: RowIndices) -> list[Label | None]:
    """Return the labels of the given rows."""
    if column is None or column.kind == NULLS:
        return [None] * len(rows)
    if column.kind in INTEGERS:
        values, present = column.numbers()
        pairs = zip(values[rows].tolist(), present[rows].tolist(), strict=True)
        return [label if is_present else None for label, is_present in pairs]
    codes, texts = column.texts()
    return [texts[code] for code in codes[rows].tolist()]
