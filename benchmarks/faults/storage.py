"""Faults of the store's environment: a full disk, a read-only disk, a stopped database, a clock that jumps."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from benchmarks.endurance.stage import Running, service
from benchmarks.faults.collector import FaultReport, Outcome, Untried, observed
from benchmarks.faults.processes import remembering
from benchmarks.load import get
from benchmarks.serving import base
from tests.support.postgres import postgres

FAULT_SECONDS, JUMP_SECONDS = 5, 3600
DISK_MIB = 24
CLOCK = """
import os, time
now, now_ns = time.time, time.time_ns
time.time = lambda: now() - {seconds} * os.path.exists({jumped!r})
time.time_ns = lambda: now_ns() - {seconds} * 10**9 * os.path.exists({jumped!r})
"""  # libfaketime made the service too slow to answer, even without a jump


@contextmanager
def _mount_small_disk() -> Iterator[Path]:
    """Mount a separate small file system."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder], capture_output=True, text=True
        )
        if mount.returncode:
            raise Untried(f"cannot mount a file system ({mount.stderr.strip()})")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def full() -> Outcome:
    """Fill the file system of the database, then free it again."""
    with _mount_small_disk() as disk, service(database_url=f"sqlite:///{disk}/memory.db") as running:

        def fault() -> None:
            ballast = disk / "ballast"
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            time.sleep(FAULT_SECONDS)
            ballast.unlink()

        return observed(running.port, fault, refused=True)


def read_only() -> Outcome:
    """Start on a read-only file system and remount it writable. The kernel forbids the reverse for files in use."""
    with _mount_small_disk() as disk:
        _remount(disk, "ro")
        with service(database_url=f"sqlite:///{disk}/memory.db") as running:

            def fault() -> None:
                time.sleep(FAULT_SECONDS)
                _remount(disk, "rw")

            return observed(running.port, fault, refused=True)


def _remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def gone() -> Outcome:
    """Stop PostgreSQL immediately and start it again."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        raise Untried("the PostgreSQL server programs are not installed (Debian: apt-get install postgresql)")
    with postgres() as cluster, service(database_url=cluster.url("faults")) as running:

        def fault() -> None:
            cluster.stop()
            time.sleep(FAULT_SECONDS)
            cluster.start()

        return observed(running.port, fault, refused=True)


def clock() -> Outcome:
    """Set the wall clock of the service's Python back by 1 h while it runs."""
    with tempfile.TemporaryDirectory(prefix="faults-clock-") as folder:
        jumped = Path(folder, "jumped")
        Path(folder, "sitecustomize.py").write_text(CLOCK.format(jumped=str(jumped), seconds=JUMP_SECONDS))
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        with remembering({"PYTHONPATH": path}) as running:

            def fault() -> FaultReport:
                jumped.touch()
                time.sleep(1)
                age = time.time() - _read_newest_time(running)
                return FaultReport(f"new rows are dated {age / 3600:.1f} h ago", age > JUMP_SECONDS / 2)

            return observed(running.port, fault)


def _read_newest_time(running: Running) -> float:
    """Return the newest `updated_at` of all engines."""
    engines = json.loads(get(f"{base(running.port)}/v1/engines")[1])["engines"]
    return max(datetime.fromisoformat(engine["updated_at"]).timestamp() for engine in engines)
