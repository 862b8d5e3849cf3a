"""A table of flights to instances: the rows of an engine, by cycle, are one. Knows columns and windows, no HTTP."""

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
KEY_COLUMNS = {  # columns that are no channels, and what may stand in them
    ENGINE: ("strings", TEXTS),
    CYCLE: ("integers", INTEGERS),
    LABEL: ("class names or indices", (*TEXTS, *INTEGERS, NULLS)),
}
RowIndices = npt.NDArray[np.int64]


@dataclass
class InstanceKey:
    """What an instance is called by: its engine, and its newest cycle."""

    engine_id: str | None
    cycle: int | None


@dataclass
class TableInstances:
    """The instances of a table: the rows of instance i stand at `order[bounds[i] : bounds[i + 1]]`, oldest first."""

    columns: dict[str, Column]
    flights: list[InstanceKey]
    order: RowIndices | None  # (rows,), None if the table has it already
    bounds: RowIndices  # (N + 1,)

    @property
    def newest(self) -> RowIndices:
        """The newest row of each instance (N,)."""
        last = self.bounds[1:] - 1
        return last if self.order is None else self.order[last]


def group_instances(table: ArrowTable, model: Model) -> TableInstances:
    """Rows to instances, in order of the engines' first appearance.

    A model with a window takes the rows of one engine, by cycle, as one instance, and without engines the whole table.
    A model without one takes each row as an instance.

    Raises:
        UnsupportedMediaType: the model's input is no row of named channels, nor a window of them.
        InvalidInput: names the column, and the row, of what is wrong.
    """
    window, channels = model.manifest.window, model.channels
    if not channels or model.input_shape not in ((len(channels),), (window, len(channels))):
        raise UnsupportedMediaType(f"{ARROW}: this model's input {list(model.input_shape)} is no row of named channels")
    _check_columns(table, channels)
    columns = {column.name: column for column in table.columns}
    names, engine = _read_engines(columns, table.rows)
    cycle = _read_cycles(columns, table.rows)
    if window is None:
        flights = [InstanceKey(names[k], None) for k in engine.tolist()]
        found = TableInstances(columns, flights, None, np.arange(table.rows + 1))
    else:
        bounds = np.concatenate([[0], np.cumsum(np.bincount(engine))])
        found = TableInstances(columns, [InstanceKey(name, None) for name in names], _sort_rows(engine, cycle), bounds)
    if CYCLE in columns:
        for flight, newest in zip(found.flights, cycle[found.newest].tolist(), strict=True):
            flight.cycle = newest
    return found


def _check_columns(table: ArrowTable, channels: tuple[str, ...]) -> None:
    """Refuse a table that lacks a channel, or has a column that is unknown, twice there, or of the wrong type."""
    wanted = dict.fromkeys(channels, ("numbers", NUMBERS)) | KEY_COLUMNS
    told = Counter(column.name for column in table.columns)
    faults = [Fault((name,), MISSING_CHANNEL) for name in channels if name not in told]
    for name, kind, _ in table.columns:
        if name not in wanted:
            faults.append(Fault((name[:80],), "unknown column"))
        elif told[name] > 1:
            faults.append(Fault((name,), "there is more than one column of this name"))
        elif kind not in wanted[name][1]:
            faults.append(Fault((name,), f"expected a column of {wanted[name][0]}, got {kind[:80]}"))
    if not (table.rows or faults):
        faults.append(Fault(("instances",), "the table has no rows"))
    refuse(faults)


def _read_engines(columns: dict[str, Column], rows: int) -> tuple[list[str | None], RowIndices]:
    """Names of the engines as they appear, and which of them each row is of; without the column one without a name."""
    if ENGINE not in columns:
        return [None], np.zeros(rows, np.int64)
    codes, texts = columns[ENGINE].texts()
    first = np.full(len(texts), rows)
    first[codes[::-1]] = np.arange(rows)[::-1]  # backwards: what is written last is the first row of a code
    rank, seen = np.zeros(len(texts), np.int64), dict[str | None, int]()
    for row in np.sort(first[first < rows]).tolist():
        name = texts[codes[row]]
        if not name or len(name) > MAX_NAME_LENGTH:
            what = MISSING if name is None else wrong_length(MAX_NAME_LENGTH, len(name))
            refuse([Fault((ENGINE, row), what)])
        if CONTROL_CHARACTER.search(name):
            refuse([Fault((ENGINE, row), CONTROL_CHARACTERS)])
        rank[codes[row]] = seen.setdefault(name, len(seen))  # a dictionary may hold a name twice
    return list(seen), rank[codes]


def _read_cycles(columns: dict[str, Column], rows: int) -> RowIndices:
    """The cycle of each row; without the column, its place in the table."""
    if CYCLE not in columns:
        return np.arange(rows)
    values, present = columns[CYCLE].numbers()
    wrong = np.flatnonzero(~present | (values < 0) | (values > MAX_CYCLE))[:MAX_FAULTS].tolist()
    told = (f"{values[row]} is not from 0 to {MAX_CYCLE}" if present[row] else MISSING for row in wrong)
    refuse([Fault((CYCLE, row), what) for row, what in zip(wrong, told, strict=True)])
    return values.astype(np.int64)


def _sort_rows(engine: RowIndices, cycle: RowIndices) -> RowIndices | None:
    """Rows by engine, then by cycle; None if they stand so already.

    Raises:
        InvalidInput: two rows of the same engine and cycle.
    """
    same = engine[1:] == engine[:-1]
    if ((engine[1:] > engine[:-1]) | (same & (cycle[1:] > cycle[:-1]))).all():
        return None
    order = np.lexsort((cycle, engine))
    engine, cycle = engine[order], cycle[order]
    twice = np.flatnonzero((engine[1:] == engine[:-1]) & (cycle[1:] == cycle[:-1]))[:MAX_FAULTS].tolist()
    refuse([Fault(("instances", int(engine[i]), CYCLE), f"cycle {cycle[i]} stands in two rows") for i in twice])
    return order


def decode_table(found: TableInstances, model: Model, hold: bool) -> DecodedInstances:
    """Readings as windows, padded, missing ones held if asked, and the labels of the newest rows.

    Raises:
        InvalidInput: names instance, row and channel of what is wrong, at most twenty places.
    """
    window, channels = model.manifest.window, model.channels
    hold = hold and window is not None  # a single row has nothing to hold
    readings = _read_channels(found, channels)
    whole = bool(np.isfinite(readings).all())
    if not whole:
        _refuse_not_finite(readings, found, channels, hold, window is None)
    faults: list[Fault] = []
    batch = np.empty((len(found.flights), *model.input_shape), dtype=np.float32)
    imputed = np.zeros(len(channels), dtype=np.int64)
    for i, (begin, end) in enumerate(pairwise(found.bounds.tolist())):
        rows: Batch | None = readings[begin:end]
        if window is not None and not whole:  # and so they are to be held
            rows, held = hold_window(readings[begin:end], window, channels, ("instances", i, "telemetry"), faults)
            imputed += held
        if rows is not None:
            batch[i] = rows[0] if window is None else windows.pad_left(rows, window)
    labels = _read_labels(found.columns.get(LABEL), found.newest)
    targets = decode_labels(labels, model.manifest.classes, faults, lambda i: ("instances", i, LABEL))
    refuse(faults)
    return DecodedInstances(batch, targets, imputed if hold else None)


def _read_channels(found: TableInstances, channels: tuple[str, ...]) -> Batch:
    """All readings (rows, channels) in the order of the instances, missing ones as NaN."""
    readings = np.empty((found.bounds[-1], len(channels)), dtype=np.float32)
    for k, name in enumerate(channels):
        values, present = found.columns[name].numbers()
        if values.dtype.kind in "iu":
            values = values.astype(np.float64)  # as numbers in JSON are read, so that the same one is the same float32
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite then is refused by its place
            readings[:, k] = values
        readings[~present, k] = np.nan
    return readings if found.order is None else readings[found.order]


def _refuse_not_finite(
    readings: Batch, found: TableInstances, channels: tuple[str, ...], hold: bool, single: bool
) -> None:
    """Refuse readings that are infinite as float32, and missing ones if they are not held."""
    unfit = np.isinf(readings) if hold else ~np.isfinite(readings)
    faults = []
    for row in np.flatnonzero(unfit.any(axis=1))[:MAX_FAULTS].tolist():
        i = int(np.searchsorted(found.bounds, row, side="right")) - 1
        place = ("instances", i, "telemetry") if single else ("instances", i, "telemetry", row - int(found.bounds[i]))
        for k in np.flatnonzero(unfit[row]).tolist():
            missing = np.isnan(readings[row, k])
            faults.append(Fault((*place, channels[k]), missing_reading("missing=hold") if missing else TOO_LARGE))
    refuse(faults)


def _read_labels(column: Column | None, rows: RowIndices) -> list[Label | None]:
    """The labels that stand in some rows."""
    if column is None or column.kind == NULLS:
        return [None] * len(rows)
    if column.kind in INTEGERS:
        values, present = column.numbers()
        pairs = zip(values[rows].tolist(), present[rows].tolist(), strict=True)
        return [value if there else None for value, there in pairs]
    codes, texts = column.texts()
    return [texts[code] for code in codes[rows].tolist()]
