"""The C library's heap, in processes of their own."""

import platform
import subprocess
import sys

import pytest

HELD = """
import numpy as np
from service import heap
if {fixed}:
    heap.give_back()
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
for size in (31, 24, 16):  # glibc learns from what is freed
    np.ones(size << 20, np.uint8)
before = resident()
large, small = [], []
for _ in range(60):  # what goes lies between what stays
    large.append(np.ones(2 << 20, np.uint8))
    small.append(np.ones(100_000, np.uint8))
large.clear()
print(resident() - before)
"""


def held(fixed: bool, **environment: str) -> float:
    """MiB that a process holds more after 120 MiB came and went, 6 MiB of small blocks between them stayed."""
    command = [sys.executable, "-c", HELD.format(fixed=fixed)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_large_blocks_go_back_to_the_machine() -> None:
    """What is freed is not held between what is not; glibc by itself would hold it, and who tunes it is left alone."""
    assert held(fixed=True) < 12
    assert held(fixed=False) > 60
    assert held(fixed=True, GLIBC_TUNABLES="glibc.malloc.tcache_count=7") > 60
