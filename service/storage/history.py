"""The newest flights of one engine in order of cycle, as a service caches them between requests. numpy only."""

from bisect import bisect_left, bisect_right
from typing import Literal

import numpy as np

from model.windows import Readings, pad_left

Result = Literal["joined", "unchanged", "conflict"]
SPARE_ROWS = 16  # at least; the array is copied only when that many flights have been appended


class EngineTail:
    """Flights of one engine, oldest first, as they were stored at one revision of the engine.

    Args:
        revision: of the engine; every change of its flights increases it.
        generation: of the database; another one means that a revision proves nothing.
        channels: names of the columns; None without flights, empty if they differ between flights.
        cycles: rising.
        values: (flights, channels).
        complete: no older flights are stored.
    """

    __slots__ = ("_values", "channels", "complete", "cycles", "generation", "revision")

    def __init__(
        self,
        revision: int,
        generation: int,
        channels: tuple[str, ...] | None,
        cycles: list[int],
        values: Readings,
        complete: bool,
    ) -> None:
        self.revision, self.generation, self.channels, self.cycles = revision, generation, channels, cycles
        self.complete = complete
        self._values = values  # with spare rows at the end

    def copy(self) -> "EngineTail":
        """Return a tail that flights can be added to. It shares memory: only one copy of a tail may be kept."""
        return EngineTail(
            self.revision, self.generation, self.channels, self.cycles.copy(), self._values, self.complete
        )

    def reaches(self, cycle: int, window: int) -> bool:
        """Return whether the window that ends at a cycle, and every later flight, is included."""
        return self.complete or bisect_right(self.cycles, cycle) >= window

    def add(self, cycle: int, row: Readings) -> Result:
        """Insert a flight in order of cycle, unless there is one of that cycle."""
        n, at = len(self.cycles), bisect_left(self.cycles, cycle)
        if at < n and self.cycles[at] == cycle:
            return "unchanged" if (self._values[at] == row).all() else "conflict"
        if n == len(self._values) or at < n:  # rows are never moved in place: windows in use are views of them
            values = np.empty((n + max(SPARE_ROWS, n), len(row)), dtype=np.float32)
            before = self._values[:n].reshape(n, len(row))
            values[:at], values[at + 1 : n + 1] = before[:at], before[at:]
            self._values = values
        self._values[at] = row
        self.cycles.insert(at, cycle)
        return "joined"

    def row(self, cycle: int) -> Readings:
        """Return a copy of the flight of a cycle that is included."""
        return np.array(self._values[bisect_left(self.cycles, cycle)])

    def window(self, cycle: int, window: int) -> Readings:
        """Return the newest `window` flights up to a cycle that is included; fewer are padded with the oldest."""
        return pad_left(self._values[: bisect_left(self.cycles, cycle) + 1], window)

    def trim(self, most: int) -> None:
        """Drop the oldest flights once there are more than twice `most`."""
        n = len(self.cycles)
        if n > 2 * most:
            self.cycles, self._values, self.complete = self.cycles[-most:], self._values[n - most : n].copy(), False
