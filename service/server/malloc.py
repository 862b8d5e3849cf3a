"""The C library's heap: what is large and freed goes back to the machine. Knows nothing of this project.

glibc learns from each large block that is freed to keep larger ones: after a body of 30 MB, or a fit over a month of
truths, everything up to 32 MB comes from a heap that has holes and never shrinks. With fixed limits it does not learn,
and a block of a MiB and more is a mapping of its own. What is smaller leaves holes, which are given back now and then.
Elsewhere (musl, macOS) nothing is set.
"""

import ctypes
import os
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of mallopt(3), by the numbers of malloc.h
LARGE = 2**20  # bytes; from 4 MiB on, or 32, large bodies were faster, and 64 at once took 480 to 570 MiB, not 290
KEPT = 2**22  # bytes at the top of the heap that stay for the next request
ARENAS = 2  # one for the event loop, one for all others; by default there are eight for each core


def give_back() -> None:
    """Fix the limits, unless the environment sets some of its own."""
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        for what, value in ((TRIM_THRESHOLD, KEPT), (MMAP_THRESHOLD, LARGE), (ARENA_MAX, ARENAS)):
            mallopt(what, value)


def tidy() -> None:
    """Give the holes back, the pages between blocks in use of which nothing is in use; to who tunes it leave them.

    It takes 10 ms for 100 MB of holes, in which most of what others ask of the heap waits.
    """
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Any:
    """A function of the C library; None where there is no such thing, or the environment sets limits of its own."""
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    return None if tuned else getattr(ctypes.CDLL(None), name, None)
