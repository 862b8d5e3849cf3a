"""The newest flights of one engine, in the order of their cycles, kept in mind between transactions. numpy only."""

from bisect import bisect_left, bisect_right
from typing import Literal

import numpy as np

from model.windows import Readings, pad_left

Result = Literal["joined", "unchanged", "conflict"]
ROOM = 16  # flights; an array is copied only when so many have come


class History:
    """Flights, oldest first. `revision` is the engine's when they were read, `layout` says what their channels are.

    Args:
        revision: of the engine.
        layout: number of the channels' names and order.
        cycles: rising.
        values: (flights, channels).
        whole: there are none before these.
    """

    __slots__ = ("_values", "cycles", "layout", "revision", "whole")

    def __init__(self, revision: int, layout: int, cycles: list[int], values: Readings, whole: bool) -> None:
        self.revision, self.layout, self.cycles, self.whole = revision, layout, cycles, whole
        self._values = values  # with room at the end

    def reaches(self, cycle: int, window: int) -> bool:
        """Whether the window up to some cycle, and every flight after it, is here."""
        return self.whole or bisect_right(self.cycles, cycle) >= window

    def add(self, cycle: int, row: Readings) -> Result:
        """Put a flight in its place, unless there is one for its cycle."""
        n, at = len(self.cycles), bisect_left(self.cycles, cycle)
        if at < n and self.cycles[at] == cycle:
            return "unchanged" if (self._values[at] == row).all() else "conflict"
        if n == len(self._values) or at < n:  # not moved in place: windows that were given away are views
            room, before = (
                np.empty((n + max(ROOM, n), len(row)), dtype=np.float32),
                self._values[:n].reshape(n, len(row)),
            )
            room[:at], room[at + 1 : n + 1] = before[:at], before[at:]
            self._values = room
        self._values[at] = row
        self.cycles.insert(at, cycle)
        return "joined"

    def row(self, cycle: int) -> Readings:
        """The flight of a cycle that is here."""
        return np.array(self._values[bisect_left(self.cycles, cycle)])

    def window(self, cycle: int, window: int) -> Readings:
        """The newest `window` flights up to a cycle that is here; fewer are padded with the oldest."""
        return pad_left(self._values[: bisect_left(self.cycles, cycle) + 1], window)

    def trim(self, most: int) -> None:
        """Forget the oldest flights once there are twice as many as that."""
        n = len(self.cycles)
        if n > 2 * most:
            self.cycles, self._values, self.whole = self.cycles[-most:], self._values[n - most : n].copy(), False
