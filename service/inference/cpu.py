"""Number of cores that this process may use. Imports nothing else from this project."""

import os
from pathlib import Path


def available_cpus() -> int:
    """Return the number of cores that this process may run on, limited by the quota of its control group."""
    runnable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(runnable, _quota_cpus(Path("/sys/fs/cgroup")) or runnable))


def _quota_cpus(cgroup: Path) -> int | None:
    """Return the processor quota of a control group (version 2 or 1), rounded up to whole cores; None without one."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None
