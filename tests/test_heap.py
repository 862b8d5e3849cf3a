"""The C library's heap, in processes of their own."""

import asyncio
import platform
import subprocess
import sys

import pytest

from service import lifecycle

KEPT = """
import resource
import numpy as np
from service import heap
heap.limit()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(9):  # a body of 15 MiB, and what is made of it
    before = faults()
    both = np.ones(15 << 20, np.uint8), np.ones(7 << 20, np.uint8)
    del both
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_what_a_large_body_took_is_there_for_the_next() -> None:
    """Of the 5,632 pages of two large blocks none is asked of the machine again while the heap is not tidied."""
    found = subprocess.run([sys.executable, "-c", KEPT], env={}, capture_output=True, text=True, check=True).stdout
    assert int(found) < 100


HOLES = """
import numpy as np
from service import heap
heap.limit()
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
blocks = [np.ones((1 + k % 2) << 20, np.uint8) for k in range(130)]
before = resident()
del blocks[1::2]
held = resident()
heap.tidy()
print(before - held, held - resident(), sum(block.sum(dtype=int) for block in blocks) == len(blocks) << 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_holes_are_given_back() -> None:
    """Of 130 MiB between what stays nothing is held once the heap is tidied, but by who tunes it."""
    for environment, least, most in (({}, 117, 143), ({"MALLOC_MMAP_THRESHOLD_": str(2**22)}, -1, 10)):
        command = [sys.executable, "-c", HOLES]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        at_once, tidied, whole = found.split()
        assert float(at_once) < 10
        assert least < float(tidied) < most
        assert whole == "True"


def test_a_process_without_threads_to_spare_is_tidied_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread is to be had the heap stays as it is, and whatever else the service does now and then goes on."""
    monkeypatch.setattr(lifecycle, "TIDY_SECONDS", 0.001)

    async def scene() -> None:
        await asyncio.get_running_loop().shutdown_default_executor()
        tidying = asyncio.create_task(lifecycle._keep_tidy())
        assert not (await asyncio.wait([tidying], timeout=0.1))[0]
        tidying.cancel()

    asyncio.run(scene())
