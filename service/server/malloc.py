"""Configuration of glibc's malloc, so that large freed blocks return to the operating system.

By default glibc raises its thresholds with each large block that is freed. After a body of 30 MB, or a fit over many
labels, blocks up to 32 MB come from a heap that is fragmented and never shrinks. With fixed thresholds, each block of
1 MiB and more is a separate mapping. Smaller blocks leave holes, which `trim` returns from time to time.
With another C library (musl, macOS) nothing is configured.
"""

import ctypes
import os
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of mallopt(3), numbers of malloc.h
MMAP_BYTES = 2**20  # with 4 or 32 MiB large bodies were faster, but 64 concurrent ones took 480-570 MiB, not 290
RETAINED_BYTES = 2**22  # at the top of the heap, for the next request
ARENAS = 2  # one for the event loop, one for all other threads; the default is eight per core


def configure() -> None:
    """Fix the thresholds, unless the environment configures malloc."""
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        for option, value in ((TRIM_THRESHOLD, RETAINED_BYTES), (MMAP_THRESHOLD, MMAP_BYTES), (ARENA_MAX, ARENAS)):
            mallopt(option, value)


def trim() -> None:
    """Return unused pages between used blocks to the system, unless the environment configures malloc.

    It takes 10 ms for 100 MB of holes. Most allocations of other threads wait meanwhile.
    """
    malloc_trim = _libc_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _libc_function(name: str) -> Any:
    """Return a function of the C library; None if it is missing, or the environment configures malloc."""
    tuned = any(variable.startswith("MALLOC_") for variable in os.environ) or "GLIBC_TUNABLES" in os.environ
    return None if tuned else getattr(ctypes.CDLL(None), name, None)
