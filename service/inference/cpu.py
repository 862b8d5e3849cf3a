"""How many cores this process may use. Knows nobody."""

import os
from pathlib import Path


def available_cpus() -> int:
    """Cores that this process may use: those it may run on, and no more than its control group pays for."""
    runnable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(runnable, _quota_cpus(Path("/sys/fs/cgroup")) or runnable))


def _quota_cpus(cgroup: Path) -> int | None:
    """The processor quota of a control group, rounded up to whole cores; None without one. Versions 2 and 1."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None
