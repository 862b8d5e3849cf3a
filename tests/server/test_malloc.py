"""The heap of the C library, tested in separate processes."""

import asyncio
import platform
import subprocess
import sys

import pytest

from service import lifecycle

FRAGMENTATION = """
import numpy as np
from service.server import malloc
if {fixed}:
    malloc.configure()
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
for size in (31, 24, 16):  # glibc adapts its thresholds to freed sizes
    np.ones(size << 20, np.uint8)
before = resident()
large, small = [], []
for _ in range(30):  # freed blocks are between used ones
    large.append(np.ones(5 << 20, np.uint8))
    small.append(np.ones(100_000, np.uint8))
large.clear()
print(resident() - before)
"""


def held(fixed: bool, **environment: str) -> float:
    """Return the growth in MiB of a process that freed 150 MiB and retains 3 MiB of small blocks between them."""
    command = [sys.executable, "-c", FRAGMENTATION.format(fixed=fixed)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_freed_large_blocks_return_to_the_system() -> None:
    """Freed large blocks are returned although small ones remain, and a user's own tuning is not changed."""
    assert held(fixed=True) < 12
    assert held(fixed=False) > 60
    assert held(fixed=True, GLIBC_TUNABLES="glibc.malloc.tcache_count=7") > 60


HOLES = """
import numpy as np
from service.server import malloc
malloc.configure()
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
blocks = [np.ones(1 << 19, np.uint8) for _ in range(400)]
before = resident()
del blocks[::2]
held = resident()
malloc.trim()
print(before - held, held - resident(), sum(block.sum(dtype=int) for block in blocks) == len(blocks) << 19)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_heap_holes_are_returned_to_the_system() -> None:
    """A trim returns 100 MiB of holes between used blocks, except under a user's own tuning."""
    for environment, least, most in (({}, 90, 110), ({"MALLOC_MMAP_THRESHOLD_": str(2**22)}, -1, 10)):
        command = [sys.executable, "-c", HOLES]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        immediate, trimmed, whole = printed.split()
        assert float(immediate) < 10
        assert least < float(trimmed) < most
        assert whole == "True"


def test_trimming_without_a_free_thread_is_postponed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the trim is skipped, and other periodic work continues."""
    monkeypatch.setattr(lifecycle, "MALLOC_TRIM_SECONDS", 0.001)

    async def scene() -> None:
        await asyncio.get_running_loop().shutdown_default_executor()
        tidying = asyncio.create_task(lifecycle._trim_malloc())
        assert not (await asyncio.wait([tidying], timeout=0.1))[0]
        tidying.cancel()

    asyncio.run(scene())
