"""The newest flights of one engine in order of cycle, cached between requests. numpy only."""

from bisect import bisect_left, bisect_right
from typing import Literal

import numpy as np

from model.windows import Readings, pad_left

FlightResult = Literal["joined", "unchanged", "conflict"]
SPARE_ROWS = 16  # minimum; the array is copied only when they are used up


class EngineTail:
    """Flights of one engine, oldest first, as they were stored at one revision of the engine.

    Args:
        revision: of the engine; every change of its flights increases it.
        generation: of the database; revisions of different generations are not comparable.
        channels: names of the columns; None without flights, empty if they differ between flights.
        cycles: ascending.
        values: (flights, channels).
        complete: no older flights are stored.
        padding: number of copies of the oldest flight in front of a complete tail, so that every window is a view.
    """

    __slots__ = ("_front", "_values", "channels", "complete", "cycles", "generation", "padding", "revision")

    def __init__(
        self,
        revision: int,
        generation: int,
        channels: tuple[str, ...] | None,
        cycles: list[int],
        values: Readings,
        complete: bool,
        padding: int = 0,
    ) -> None:
        self.revision, self.generation, self.channels, self.cycles = revision, generation, channels, cycles
        self.complete, self.padding = complete, padding
        self._front, self._values = 0, values  # number of padding rows; padding, flights and spare rows

    def copy(self) -> "EngineTail":
        """Return a tail that flights can be added to. It shares memory, so only one copy of a tail may be stored."""
        tail = EngineTail(
            self.revision,
            self.generation,
            self.channels,
            self.cycles.copy(),
            self._values,
            self.complete,
            self.padding,
        )
        tail._front = self._front
        return tail

    def reaches(self, cycle: int, window: int) -> bool:
        """Return whether the window that ends at a cycle, and every later flight, is included."""
        return self.complete or bisect_right(self.cycles, cycle) >= window

    def add(self, cycle: int, row: Readings) -> FlightResult:
        """Insert a flight in order of cycle, unless that cycle has one already."""
        n, index = len(self.cycles), bisect_left(self.cycles, cycle)
        if index < n and self.cycles[index] == cycle:
            return "unchanged" if (self._values[self._front + index] == row).all() else "conflict"
        if self._front + n == len(self._values) or index < n:  # rows are never moved in place: windows are views
            self._insert_row(index, row)
        else:
            self._values[self._front + index] = row
        self.cycles.insert(index, cycle)
        return "joined"

    def row(self, cycle: int) -> Readings:
        """Return a copy of the flight of a cycle that is included."""
        return np.array(self._values[self._front + bisect_left(self.cycles, cycle)])

    def window(self, cycle: int, window: int) -> Readings:
        """Return the newest `window` flights up to a cycle that is included; fewer are padded with the oldest."""
        end = self._front + bisect_left(self.cycles, cycle) + 1
        return self._values[end - window : end] if end >= window else pad_left(self._values[self._front : end], window)

    def trim(self, window: int) -> None:
        """Drop all but the newest `window` flights if there are more than twice as many."""
        n = len(self.cycles)
        if n > 2 * window:
            begin, end = self._front + n - window, self._front + n
            self.cycles, self._values, self.complete = self.cycles[-window:], self._values[begin:end].copy(), False
            self._front = 0

    def _insert_row(self, index: int, row: Readings) -> None:
        """Copy the flights to a larger array, with another one inserted at an index."""
        n, front = len(self.cycles), self.padding if self.complete else 0
        values = np.empty((front + n + max(SPARE_ROWS, n), len(row)), dtype=np.float32)
        before = self._values[self._front : self._front + n].reshape(n, len(row))
        values[front : front + index], values[front + index + 1 : front + n + 1] = before[:index], before[index:]
        values[front + index] = row
        values[:front] = values[front]
        self._front, self._values = front, values
