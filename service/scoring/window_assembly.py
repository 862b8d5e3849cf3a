"""Assemble windows from rows of many engines: sort the rows of each engine by cycle and prepend its earlier rows.

A row is pending until `horizon` more rows were read, because earlier cycles of its engine may still follow. Windows
have the order of the rows. RAM is bounded by the horizon and by the number of engine states, not by the input.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model.windows import Readings, hold_last
from service.scoring.engine_states import EngineStates
from service.scoring.options import Options
from service.scoring.rows import Layout, Reject, Rows
from service.scoring.sources import Source

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
RELEASE_ROWS = 2**16  # pending rows beyond the horizon that are released together
MAX_UNIT_ROWS = 2**14  # maximum number of scored rows of a work unit
MAX_LAID_OUT_ROWS = 2**18  # maximum rows of a work unit, with the earlier rows of its engines
NO_EARLIER_VALUE = "a value is missing, and its channel has no earlier value to hold"


@dataclass
class WorkUnit:
    """Rows that are scored together, in the order of the output.

    The window of row i is `flat[starts[i] : starts[i] + window]`. Overlapping windows share their rows.
    """

    flat: Readings  # (M, C)
    starts: Integers  # (N,)
    engine_ids: Any  # (N,) Arrow strings
    engine: Integers  # (N,) engine numbers, by first appearance
    cycle: Integers
    label: Integers  # class index, -1 without a label
    file: Integers
    row: Integers
    rejects: list[Reject] = field(default_factory=list)  # rows rejected since the previous unit
    engine_count: int = 0  # number of engines read so far
    input_fraction: float = 0.0  # share of the input that is read and released


@dataclass
class PendingRows:
    """Columns of pending rows, in the order in which they were read."""

    readings: Readings
    engine: Integers
    cycle: Integers
    label: Integers
    file: Integers
    row: Integers
    position: Integers  # number among all rows of the job

    def __len__(self) -> int:
        return len(self.engine)

    def concatenate(self, other: "PendingRows") -> "PendingRows":
        """Return these rows followed by others."""
        return PendingRows(*(np.concatenate([column, other.__dict__[name]]) for name, column in self.__dict__.items()))

    def select(self, index: Integers | Mask) -> "PendingRows":
        """Return a subset of the rows."""
        return PendingRows(*(column[index] for column in self.__dict__.values()))


class WindowAssembler:
    """Collect rows and release work units.

    With the option `latest`, it releases only the newest window of each engine, after the last row.
    """

    def __init__(self, states: EngineStates, files: list[str], options: Options) -> None:
        self.states, self.files, self.horizon, self.latest = states, files, options.horizon, options.latest
        self._max_unit_rows = min(MAX_UNIT_ROWS, options.part_rows)
        self.window, channels = states.dtype["window"].shape
        self._no_rows = PendingRows(np.empty((0, channels), np.float32), *[np.empty(0, np.int64)] * 6)
        self._pending, self._row_count = self._no_rows, 0
        self._engine_numbers: dict[str, int] = {}
        self._engine_ids: list[str] = []
        self._rejects: list[Reject] = []
        self._fraction = 0.0

    def add_rows(self, rows: Rows, file: int, rejects: list[Reject], fraction: float) -> Iterator[WorkUnit]:
        """Add rows of one file. Yield the units of the rows that leave the horizon."""
        self._rejects += rejects
        self._fraction = fraction
        engine, n, added = self._number_engines(rows.engine_ids), len(rows.cycle), 0
        max_pending = self.horizon + RELEASE_ROWS
        files, positions = np.full(n, file), self._row_count + np.arange(n)
        new = PendingRows(rows.readings, engine, rows.cycle, rows.label, files, rows.row, positions)
        self._row_count += n
        while added < n:
            next_rows = slice(added, added + max_pending - len(self._pending))
            self._pending = self._pending.concatenate(new.select(next_rows))  # type: ignore[arg-type]  # a slice is a valid index too
            added = min(next_rows.stop, n)
            if len(self._pending) == max_pending:
                yield from self._release_first(RELEASE_ROWS)
        if len(self._rejects) >= RELEASE_ROWS:
            yield self._build_unit(self._no_rows, self._no_rows.readings, self._no_rows.engine)

    def flush(self) -> Iterator[WorkUnit]:
        """Yield the units of all pending rows."""
        yield from self._release_first(len(self._pending))
        if self.latest:
            yield from self._newest_units()
        yield self._build_unit(self._no_rows, self._no_rows.readings, self._no_rows.engine)

    def _number_engines(self, engine_ids: Any) -> Integers:
        encoded = engine_ids.dictionary_encode()
        unique_ids = encoded.dictionary.to_pylist()
        for engine_id in unique_ids:
            if engine_id not in self._engine_numbers:
                self._engine_numbers[engine_id] = len(self._engine_ids)
                self._engine_ids.append(engine_id)
        numbers = np.array([self._engine_numbers[engine_id] for engine_id in unique_ids], dtype=np.int64)
        return np.asarray(numbers[encoded.indices.to_numpy(zero_copy_only=False)])

    def _release_first(self, count: int) -> Iterator[WorkUnit]:
        """Yield units of the first `count` pending rows and of the earlier cycles of their engines."""
        if not count:
            return
        last_position = self._pending.position[count - 1]
        while len(self._pending) and self._pending.position[0] <= last_position:
            due = int(np.searchsorted(self._pending.position, last_position, side="right"))
            due = min(due, self._max_unit_rows)
            yield self._release_rows(self._count_fitting(due))

    def _count_fitting(self, count: int) -> int:
        """Return how many of the first `count` rows fit into one unit with the earlier rows of their engines."""
        new = np.zeros(count, np.int64)
        new[np.unique(self._pending.engine[:count], return_index=True)[1]] = 1
        engines = np.cumsum(new)
        fits = (engines * (self.window - 1) + np.arange(1, count + 1) <= MAX_LAID_OUT_ROWS) & (
            engines <= self.states.capacity
        )
        return max(int(np.count_nonzero(fits)), 1)

    def _release_rows(self, count: int) -> WorkUnit:
        rows = self._take_rows(count)
        engines, index = np.unique(rows.engine, return_inverse=True)
        records = self.states.load_records(engines)
        last_scored = records["cycle"]
        late = rows.cycle <= last_scored[index]
        duplicate = np.zeros(len(rows), np.bool_)
        duplicate[1:] = (np.diff(rows.engine) == 0) & (np.diff(rows.cycle) == 0)
        incomplete = self._hold_missing(rows, records, index, ~late & ~duplicate)
        faults = (
            (late, self._late_reason),
            (duplicate & ~late, self._duplicate_reason),
            (incomplete, lambda *_: NO_EARLIER_VALUE),
        )
        for rejected, reason in faults:
            for i in np.flatnonzero(rejected).tolist():
                message = reason(int(rows.cycle[i]), int(last_scored[index[i]]))
                self._rejects.append(Reject(int(rows.row[i]), self.files[rows.file[i]], message))
        valid = ~(late | duplicate | incomplete)
        unit = self._lay_out(rows.select(valid), records, index[valid])
        self.states.store_records(engines, records)
        return unit

    def _take_rows(self, count: int) -> PendingRows:
        """Remove and return the first pending rows and earlier cycles of their engines, sorted by engine and cycle."""
        pending, last = self._pending, np.full(len(self._engine_ids), -1, np.int64)
        np.maximum.at(last, pending.engine[:count], pending.cycle[:count])
        due = pending.cycle <= last[pending.engine]
        self._pending = pending.select(~due)
        rows = pending.select(due)
        return rows.select(np.lexsort((rows.position, rows.cycle, rows.engine)))

    def _late_reason(self, cycle: int, last_scored: int) -> str:
        if cycle == last_scored:
            return self._duplicate_reason(cycle, last_scored)
        horizon = f"by more than the horizon of {self.horizon} rows"
        return f"cycle {cycle} comes after cycle {last_scored} of its engine, {horizon}; increase --horizon"

    def _duplicate_reason(self, cycle: int, _: int) -> str:
        return f"cycle {cycle} of its engine is a duplicate of an earlier row"

    def _hold_missing(self, rows: PendingRows, records: Any, index: Integers, valid: Mask) -> Mask:
        """Replace missing values by the last ones of their channels. Return which valid rows remain incomplete."""
        missing = np.isnan(rows.readings).any(axis=1) & valid
        incomplete = np.zeros(len(rows), np.bool_)
        for k in np.unique(index[missing]).tolist():
            begin, end = np.searchsorted(index, (k, k + 1))
            own_rows = begin + np.flatnonzero(valid[begin:end])
            filled = hold_last(np.concatenate([records["last_values"][k][None], rows.readings[own_rows]]))[0][1:]
            rows.readings[own_rows], incomplete[own_rows] = filled, np.isnan(filled).any(axis=1)
        last = np.flatnonzero(valid)[::-1]
        indices, first = np.unique(index[last], return_index=True)
        records["last_values"][indices] = rows.readings[last[first]]
        return incomplete

    def _lay_out(self, rows: PendingRows, records: Any, index: Integers) -> WorkUnit:
        """Place rows after the newest windows of their engines, and update these windows."""
        overlap = self.window - 1
        indices, begin, counts = np.unique(index, return_index=True, return_counts=True)
        starts = np.arange(len(rows)) + np.repeat(np.arange(len(indices)), counts) * overlap
        flat = np.empty((len(rows) + len(indices) * overlap, rows.readings.shape[1]), np.float32)
        flat[starts + overlap] = rows.readings
        prefix = records["window"][indices, 1:]
        new = records["cycle"][indices] < 0
        prefix[new] = rows.readings[begin[new], None]
        flat[starts[begin][:, None] + np.arange(overlap)] = prefix
        last = begin + counts - 1
        records["window"][indices] = flat[starts[last][:, None] + np.arange(self.window)]
        for name, column in (("cycle", rows.cycle), ("label", rows.label), ("file", rows.file), ("row", rows.row)):
            records[name][indices] = column[last]
        if self.latest:
            return self._build_unit(self._no_rows, self._no_rows.readings, self._no_rows.engine)
        order = np.argsort(rows.position, kind="stable")
        return self._build_unit(rows.select(order), flat, starts[order])

    def _newest_units(self) -> Iterator[WorkUnit]:
        """Yield units of the newest window of each engine, by first appearance."""
        size = max(min(MAX_LAID_OUT_ROWS // self.window, self.states.capacity), 1)
        for begin in range(0, self.states.engine_count, size):
            engines = np.arange(begin, min(begin + size, self.states.engine_count))
            records = self.states.load_records(engines)
            engines, records = engines[records["cycle"] >= 0], records[records["cycle"] >= 0]
            columns = [np.ascontiguousarray(records[name]) for name in ("cycle", "label", "file", "row")]
            flat = np.ascontiguousarray(records["window"]).reshape(-1, records["window"].shape[-1])
            cycle, label, file, row = columns
            rows = PendingRows(flat, engines, cycle, label, file, row, engines)
            yield self._build_unit(rows, flat, np.arange(len(engines)) * self.window)

    def _build_unit(self, rows: PendingRows, flat: Readings, starts: Integers) -> WorkUnit:
        import pyarrow as pa

        engines, index = np.unique(rows.engine, return_inverse=True)
        engine_ids = pa.array([self._engine_ids[k] for k in engines.tolist()], pa.string()).take(pa.array(index))
        rejects, self._rejects = self._rejects, []
        released = 1 - len(self._pending) / max(self._row_count, 1)
        progress = (rejects, len(self._engine_ids), self._fraction * released)
        return WorkUnit(flat, starts, engine_ids, rows.engine, rows.cycle, rows.label, rows.file, rows.row, *progress)


def assemble_units(options: Options, layout: Layout, sources: list[Source], states: EngineStates) -> Iterator[WorkUnit]:
    """Yield all units of a job, in order.

    Raises:
        InvalidInput: a file cannot be read.
    """
    assembler = WindowAssembler(states, [source.name for source in sources], options)
    total, read = sum(source.size for source in sources), 0
    for k, source in enumerate(sources):
        for rows, rejects, fraction in layout.read_rows(source):
            yield from assembler.add_rows(rows, k, rejects, (read + fraction * source.size) / total)
        read += source.size
    yield from assembler.flush()
