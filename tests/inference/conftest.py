import time

import pytest

from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that admission and batcher read in place of `time.perf_counter`."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock
