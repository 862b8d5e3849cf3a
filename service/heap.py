"""The C library's heap: what a body took is there for the next, and goes back in time. Knows nothing of this project.

A large block that glibc maps by itself costs a fault for each of its pages, each time, a tenth of the time of a body of
15 MB; so blocks come from the heap, and its holes are given back once in a while. Left alone, it keeps them for ever.
Elsewhere (musl, macOS) nothing is set.
"""

import ctypes
import os
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of mallopt(3), by the numbers of malloc.h
LARGE = 2**25  # bytes, the most that glibc takes; larger blocks are mappings of their own
KEPT = 2**25  # bytes at the top of the heap that stay for the next request
ARENAS = 2  # one for the event loop, one for all others; by default there are eight for each core


def limit() -> None:
    """Fix the limits, which otherwise follow what is freed, unless the environment sets some of its own."""
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
