"""Newest window and last values of each engine, in RAM up to a limit and in a temporary file beyond it.

All states have the same size. The file is a table indexed by engine number.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.inference.onnx_model import Model

Integers = npt.NDArray[np.int64]
MAX_BYTES = 2**25  # maximum size of the states in RAM
EVICTION_DIVISOR = 4  # one in this number of slots is evicted at a time


class EngineStates:
    """One numpy record for each engine that was read."""

    def __init__(self, window: int, channels: int, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.dtype = np.dtype(
            [
                ("cycle", "i8"),  # last scored cycle, -1 before the first
                ("label", "i8"),  # label of the newest row; the next two fields are its file and row number
                ("file", "i8"),
                ("row", "i8"),
                ("last_values", "f4", (channels,)),  # last value of each channel, NaN before the first
                ("window", "f4", (window, channels)),  # newest window, padded on the left with the oldest row
            ]
        )
        self.capacity = max(max_bytes // self.dtype.itemsize, 1)
        self._new_record = np.zeros((), self.dtype)
        self._new_record["cycle"], self._new_record["last_values"] = -1, np.nan
        self._records = np.zeros(self.capacity, self.dtype)  # the system allocates only used pages
        self._used_at = np.zeros(self.capacity, np.int64)  # clock of the last access to each slot
        self._owner = np.full(self.capacity, -1, np.int64)
        self._slot_of_engine: dict[int, int] = {}
        self._free = list(range(self.capacity))
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # deleted when the process ends
        self._clock = 0
        self.engine_count = 0

    @classmethod
    def for_model(cls, model: Model, folder: Path) -> "EngineStates":
        """Return empty states for the windows (or single rows) of a model."""
        return cls(model.manifest.window or 1, len(model.channels), folder)

    def close(self) -> None:
        """Close the temporary file."""
        self._file.close()

    def load_records(self, engines: Integers) -> npt.NDArray[Any]:
        """Return copies of the records of at most `capacity` engines. New engines have empty records."""
        return self._records[self._slots_of(engines)]

    def store_records(self, engines: Integers, records: npt.NDArray[Any]) -> None:
        """Store changed records."""
        self._records[self._slots_of(engines)] = records

    def _slots_of(self, engines: Integers) -> Integers:
        self._clock += 1
        slots = np.array([self._slot_of_engine.get(engine, -1) for engine in engines.tolist()], dtype=np.int64)
        self._used_at[slots[slots >= 0]] = self._clock
        absent = np.flatnonzero(slots < 0)
        if len(absent):
            slots[absent] = self._load_missing(engines[absent])
        return slots

    def _load_missing(self, engines: Integers) -> Integers:
        while len(self._free) < len(engines):
            self._evict(len(engines))
        slots = np.array([self._free.pop() for _ in range(len(engines))], dtype=np.int64)
        self._used_at[slots], self._owner[slots] = self._clock, engines
        for engine, slot in zip(engines.tolist(), slots.tolist(), strict=True):
            self._slot_of_engine[engine] = slot
            if engine < self.engine_count:
                self._records[slot] = self._read_record(engine)
            else:
                self._records[slot] = self._new_record
        self.engine_count = max(self.engine_count, int(engines.max()) + 1)
        return slots

    def _evict(self, needed: int) -> None:
        """Write the least recently used states to the file."""
        idle = np.flatnonzero((self._used_at < self._clock) & (self._owner >= 0))
        if not len(idle):
            raise ValueError(f"{needed} engines need slots, but all {self.capacity} slots are in use")
        oldest = idle[np.argsort(self._used_at[idle], kind="stable")][: max(self.capacity // EVICTION_DIVISOR, needed)]
        for slot in oldest.tolist():
            engine = int(self._owner[slot])
            del self._slot_of_engine[engine]
            os.pwrite(self._file.fileno(), self._records[slot].tobytes(), engine * self.dtype.itemsize)
        self._owner[oldest] = -1
        self._free += oldest.tolist()

    def _read_record(self, engine: int) -> Any:
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), size, engine * size), self.dtype)[0]
