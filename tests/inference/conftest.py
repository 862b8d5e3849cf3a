import time

import pytest

from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace `time.perf_counter` by a clock that admission and batcher read."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock
