"""What is known of each engine between its rows: its newest window. In memory up to a limit, in a file beyond it.

Every state has the same size, so that the file is a plain table, by the engine's number. Knows numpy and no columns.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.inference.model_loader import Model

Integers = npt.NDArray[np.int64]
MOST_BYTES = 2**25  # of states in memory
ROOM = 4  # of the places are freed at once: one in so many


class States:
    """One record for each engine that was seen, in numpy's terms."""

    def __init__(self, window: int, channels: int, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.kind = np.dtype(
            [
                ("cycle", "i8"),  # newest that was scored, -1 before the first
                ("label", "i8"),  # of the newest row, and where that stands
                ("file", "i8"),
                ("row", "i8"),
                ("seen", "f4", (channels,)),  # last value of each channel, NaN before the first
                ("rows", "f4", (window, channels)),  # newest window, padded on the left with the oldest row
            ]
        )
        self.places = max(most_bytes // self.kind.itemsize, 1)
        self._blank = np.zeros((), self.kind)
        self._blank["cycle"], self._blank["seen"] = -1, np.nan
        self._records = np.zeros(self.places, self.kind)  # of which only what is used takes memory
        self._used = np.zeros(self.places, np.int64)  # when each place was last asked for
        self._owner = np.full(self.places, -1, np.int64)
        self._place_of: dict[int, int] = {}
        self._free = list(range(self.places))
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # gone with the process, however it ends
        self._clock = 0
        self.engines = 0

    @classmethod
    def of(cls, model: Model, folder: Path) -> "States":
        """Those that a model needs: windows of its channels, or single rows."""
        return cls(model.manifest.window or 1, len(model.channels), folder)

    def close(self) -> None:
        """Forget everything."""
        self._file.close()

    def records_of(self, engines: Integers) -> npt.NDArray[Any]:
        """The records of some engines, at most `places` of them, to be changed and kept; of new ones blank."""
        return self._records[self._places_of(engines)]

    def keep(self, engines: Integers, records: npt.NDArray[Any]) -> None:
        """Take over what was changed in some records."""
        self._records[self._places_of(engines)] = records

    def _places_of(self, engines: Integers) -> Integers:
        self._clock += 1
        known = np.array([self._place_of.get(engine, -1) for engine in engines.tolist()], dtype=np.int64)
        self._used[known[known >= 0]] = self._clock
        absent = np.flatnonzero(known < 0)
        if len(absent):
            known[absent] = self._load(engines[absent])
        return known

    def _load(self, engines: Integers) -> Integers:
        while len(self._free) < len(engines):
            self._make_room(len(engines))
        places = np.array([self._free.pop() for _ in range(len(engines))], dtype=np.int64)
        self._used[places], self._owner[places] = self._clock, engines
        for engine, place in zip(engines.tolist(), places.tolist(), strict=True):
            self._place_of[engine] = place
            if engine < self.engines:
                self._records[place] = self._read(engine)
            else:
                self._records[place] = self._blank
        self.engines = max(self.engines, int(engines.max()) + 1)
        return places

    def _make_room(self, wanted: int) -> None:
        """Write the states that were not asked for longest to the file."""
        idle = np.flatnonzero((self._used < self._clock) & (self._owner >= 0))
        if not len(idle):
            raise ValueError(f"{wanted} more engines at once than {self.places} places")
        oldest = idle[np.argsort(self._used[idle], kind="stable")][: max(self.places // ROOM, wanted)]
        for place in oldest.tolist():
            engine = int(self._owner[place])
            del self._place_of[engine]
            os.pwrite(self._file.fileno(), self._records[place].tobytes(), engine * self.kind.itemsize)
        self._owner[oldest] = -1
        self._free += oldest.tolist()

    def _read(self, engine: int) -> Any:
        size = self.kind.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), size, engine * size), self.kind)[0]
