"""Rows of many engines, as they come, to windows: in the order of their cycles, laid behind what was before them.

A row waits until `horizon` more rows were read: rows of its engine with earlier cycles may still come before it.
Answers are wanted in the order of the rows. Memory is bounded by the horizon and a number of states, not by the rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model.windows import Readings, hold_last
from service.scoring.engine_states import States
from service.scoring.options import Options
from service.scoring.rows import Layout, Reject, Rows
from service.scoring.sources import Source

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
BLOCK = 2**16  # rows after which it is looked whether others have waited long enough
UNIT = 2**14  # rows of a unit
FLAT = 2**18  # rows that it may lay out, those before its own included
NO_VALUE = "a value is missing, and no earlier one of its channel was there to hold"


@dataclass
class Unit:
    """Rows that are scored together, in the order of the output.

    The window of row i is `flat[starts[i] : starts[i] + window]`: overlapping ones lie there once.
    """

    flat: Readings  # (M, C)
    starts: Integers  # (N,)
    names: Any  # (N,) engine ids, Arrow
    engine: Integers  # (N,) their numbers, by first appearance
    cycle: Integers
    label: Integers  # -1 without one
    file: Integers
    row: Integers
    rejects: list[Reject] = field(default_factory=list)  # that became known since the unit before
    engines: int = 0  # seen so far
    fraction: float = 0.0  # of the input, as far as it is known


@dataclass
class Waiting:
    """Columns of the rows that wait, in the order in which they were read."""

    readings: Readings
    engine: Integers
    cycle: Integers
    label: Integers
    file: Integers
    row: Integers
    position: Integers  # among all rows that ever waited

    def __len__(self) -> int:
        return len(self.engine)

    def followed_by(self, other: "Waiting") -> "Waiting":
        """These, and others after them."""
        return Waiting(*(np.concatenate([mine, other.__dict__[name]]) for name, mine in self.__dict__.items()))

    def at(self, which: Integers | Mask) -> "Waiting":
        """Some of them."""
        return Waiting(*(column[which] for column in self.__dict__.values()))


class Gatherer:
    """Rows in, units out. With `latest` units of rows come at the end only: the newest window of each engine."""

    def __init__(self, states: States, files: list[str], options: Options) -> None:
        self.states, self.files, self.horizon, self.latest = states, files, options.horizon, options.latest
        self._most = min(UNIT, options.part_rows)
        self.window, channels = states.kind["rows"].shape
        self._none = Waiting(np.empty((0, channels), np.float32), *[np.empty(0, np.int64)] * 6)
        self._waiting, self._count = self._none, 0
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._rejects: list[Reject] = []
        self._fraction = 0.0

    def add(self, rows: Rows, file: int, rejects: list[Reject], fraction: float) -> Iterator[Unit]:
        """Take rows of one file, and give those that have waited long enough."""
        self._rejects += rejects
        self._fraction = fraction
        engine, n, done, most = self._numbered(rows.names), len(rows.cycle), 0, self.horizon + BLOCK
        files, positions = np.full(n, file), self._count + np.arange(n)
        new = Waiting(rows.readings, engine, rows.cycle, rows.label, files, rows.row, positions)
        self._count += n
        while done < n:
            taken = slice(done, done + most - len(self._waiting))
            self._waiting = self._waiting.followed_by(new.at(taken))  # type: ignore[arg-type]  # a slice is as good
            done = min(taken.stop, n)
            if len(self._waiting) == most:
                yield from self._units(BLOCK)
        if len(self._rejects) >= BLOCK:
            yield self._unit(self._none, self._none.readings, self._none.engine)

    def end(self) -> Iterator[Unit]:
        """Give what is left."""
        yield from self._units(len(self._waiting))
        if self.latest:
            yield from self._newest()
        yield self._unit(self._none, self._none.readings, self._none.engine)

    def _numbered(self, names: Any) -> Integers:
        coded = names.dictionary_encode()
        texts = coded.dictionary.to_pylist()
        for text in texts:
            if text not in self._numbers:
                self._numbers[text] = len(self._names)
                self._names.append(text)
        numbers = np.array([self._numbers[text] for text in texts], dtype=np.int64)
        return np.asarray(numbers[coded.indices.to_numpy(zero_copy_only=False)])

    def _units(self, count: int) -> Iterator[Unit]:
        """The first `count` rows that wait, and with them what must come before them."""
        if not count:
            return
        until = self._waiting.position[count - 1]
        while len(self._waiting) and self._waiting.position[0] <= until:
            due = int(np.searchsorted(self._waiting.position, until, side="right"))
            due = min(due, self._most)
            yield self._release(self._fitting(due))

    def _fitting(self, count: int) -> int:
        """How many rows, at most `count`, can be laid out with what their engines need before them."""
        new = np.zeros(count, np.int64)
        new[np.unique(self._waiting.engine[:count], return_index=True)[1]] = 1
        engines = np.cumsum(new)
        fits = (engines * (self.window - 1) + np.arange(1, count + 1) <= FLAT) & (engines <= self.states.places)
        return max(int(np.count_nonzero(fits)), 1)

    def _release(self, count: int) -> Unit:
        rows = self._taken(count)
        engines, index = np.unique(rows.engine, return_inverse=True)
        records = self.states.records_of(engines)
        scored = records["cycle"]
        late = rows.cycle <= scored[index]
        twice = np.zeros(len(rows), np.bool_)
        twice[1:] = (np.diff(rows.engine) == 0) & (np.diff(rows.cycle) == 0)
        empty = self._held(rows, records, index, ~late & ~twice)
        for wrong, reason in ((late, self._late), (twice & ~late, self._twice), (empty, lambda *_: NO_VALUE)):
            for i in np.flatnonzero(wrong).tolist():
                place = int(rows.row[i]), self.files[rows.file[i]]
                self._rejects.append(Reject(*place, reason(int(rows.cycle[i]), int(scored[index[i]]))))
        fit = ~(late | twice | empty)
        unit = self._laid_out(rows.at(fit), records, index[fit])
        self.states.keep(engines, records)
        return unit

    def _taken(self, count: int) -> Waiting:
        """The first rows that wait, and earlier cycles of their engines, by engine and cycle; they wait no more."""
        waiting, last = self._waiting, np.full(len(self._names), -1, np.int64)
        np.maximum.at(last, waiting.engine[:count], waiting.cycle[:count])
        taken = waiting.cycle <= last[waiting.engine]
        self._waiting = waiting.at(~taken)
        rows = waiting.at(taken)
        return rows.at(np.lexsort((rows.position, rows.cycle, rows.engine)))

    def _late(self, cycle: int, scored: int) -> str:
        if cycle == scored:
            return self._twice(cycle, scored)
        return (
            f"cycle {cycle} comes after cycle {scored} of its engine, by more than the horizon of {self.horizon} rows"
        )

    def _twice(self, cycle: int, _: int) -> str:
        return f"cycle {cycle} of its engine stands in an earlier row"

    def _held(self, rows: Waiting, records: Any, index: Integers, fit: Mask) -> Mask:
        """Fill missing values with the last seen ones; which rows lack one still."""
        missing = np.isnan(rows.readings).any(axis=1) & fit
        lacking = np.zeros(len(rows), np.bool_)
        for k in np.unique(index[missing]).tolist():
            begin, end = np.searchsorted(index, (k, k + 1))
            mine = begin + np.flatnonzero(fit[begin:end])
            filled = hold_last(np.concatenate([records["seen"][k][None], rows.readings[mine]]))[0][1:]
            rows.readings[mine], lacking[mine] = filled, np.isnan(filled).any(axis=1)
        last = np.flatnonzero(fit)[::-1]
        who, first = np.unique(index[last], return_index=True)
        records["seen"][who] = rows.readings[last[first]]
        return lacking

    def _laid_out(self, rows: Waiting, records: Any, index: Integers) -> Unit:
        """Rows behind the windows of their engines so far; the windows of the newest rows are the next ones' past."""
        before = self.window - 1
        who, begin, counts = np.unique(index, return_index=True, return_counts=True)
        starts = np.arange(len(rows)) + np.repeat(np.arange(len(who)), counts) * before
        flat = np.empty((len(rows) + len(who) * before, rows.readings.shape[1]), np.float32)
        flat[starts + before] = rows.readings
        prefix = records["rows"][who, 1:]
        new = records["cycle"][who] < 0
        prefix[new] = rows.readings[begin[new], None]
        flat[starts[begin][:, None] + np.arange(before)] = prefix
        last = begin + counts - 1
        records["rows"][who] = flat[starts[last][:, None] + np.arange(self.window)]
        for name, column in (("cycle", rows.cycle), ("label", rows.label), ("file", rows.file), ("row", rows.row)):
            records[name][who] = column[last]
        if self.latest:
            return self._unit(self._none, self._none.readings, self._none.engine)
        order = np.argsort(rows.position, kind="stable")
        return self._unit(rows.at(order), flat, starts[order])

    def _newest(self) -> Iterator[Unit]:
        """The newest window of each engine, by first appearance."""
        size = max(min(FLAT // self.window, self.states.places), 1)
        for begin in range(0, self.states.engines, size):
            engines = np.arange(begin, min(begin + size, self.states.engines))
            records = self.states.records_of(engines)
            engines, records = engines[records["cycle"] >= 0], records[records["cycle"] >= 0]
            columns = [np.ascontiguousarray(records[name]) for name in ("cycle", "label", "file", "row")]
            flat = np.ascontiguousarray(records["rows"]).reshape(-1, records["rows"].shape[-1])
            cycle, label, file, row = columns
            rows = Waiting(flat, engines, cycle, label, file, row, engines)
            yield self._unit(rows, flat, np.arange(len(engines)) * self.window)

    def _unit(self, rows: Waiting, flat: Readings, starts: Integers) -> Unit:
        import pyarrow as pa

        known, index = np.unique(rows.engine, return_inverse=True)
        names = pa.array([self._names[k] for k in known.tolist()], pa.string()).take(pa.array(index))
        rejects, self._rejects = self._rejects, []
        scored = 1 - len(self._waiting) / max(self._count, 1)
        about = (rejects, len(self._names), self._fraction * scored)
        return Unit(flat, starts, names, rows.engine, rows.cycle, rows.label, rows.file, rows.row, *about)


def units(options: Options, layout: Layout, sources: list[Source], states: States) -> Iterator[Unit]:
    """All units of a job, in order.

    Raises:
        InvalidInput: a file cannot be read.
    """
    gatherer = Gatherer(states, [source.name for source in sources], options)
    total, before = sum(source.size for source in sources), 0
    for k, source in enumerate(sources):
        for rows, rejects, fraction in layout.read(source):
            yield from gatherer.add(rows, k, rejects, (before + fraction * source.size) / total)
        before += source.size
    yield from gatherer.end()
