"""Faults of the service's processes: SIGKILL, out of memory, SIGSTOP, out of file descriptors."""

import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.endurance.stage import MIB, Running, service
from benchmarks.faults.collector import FaultReport, Outcome, Untried, observed
from benchmarks.peers import BUILD

CGROUPS = Path("/sys/fs/cgroup")
STOPPED_SECONDS = 10
HEADROOM = 64 * MIB  # memory limit of the group above its usage
BALLAST = 96 * MIB  # size of the body that is then sent to a worker
DESCRIPTORS, CONNECTIONS, HELD_SECONDS = 64, 200, 5


@contextmanager
def remembering(environment: Mapping[str, str] | None = None, **settings: object) -> Iterator[Running]:
    """Start the service with a separate database file on a real disk."""
    BUILD.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="faults-", dir=BUILD) as folder,
        service(environment, database_url=f"sqlite:///{folder}/memory.db", **settings) as running,
    ):
        yield running


def killed() -> Outcome:
    """Send SIGKILL to one of two workers."""
    with remembering(workers=2) as running:

        def fault() -> None:
            os.kill(running.workers()[0], signal.SIGKILL)

        return observed(running.port, fault)


def stopped() -> Outcome:
    """Send SIGSTOP to the only process, and SIGCONT after 10 s."""
    with remembering() as running:

        def fault() -> None:
            os.kill(running.pid, signal.SIGSTOP)
            time.sleep(STOPPED_SECONDS)
            os.kill(running.pid, signal.SIGCONT)

        return observed(running.port, fault)


def out_of_memory() -> Outcome:
    """Let the kernel kill a worker that exceeds the memory limit of its control group."""
    with (
        remembering(workers=2, max_body_bytes=2 * BALLAST, request_seconds=5) as running,
        _create_control_group() as group,
    ):
        before = set(running.workers())
        for pid in (running.pid, *before):
            (group / "cgroup.procs").write_text(str(pid))

        def fault() -> FaultReport:
            _set_limit(group, _read_usage(group) + HEADROOM)
            hog = socket.create_connection(("127.0.0.1", running.port))
            with hog, suppress(OSError):  # the connection is reset when the worker is killed
                hog.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {BALLAST}\r\n\r\n".encode())
                hog.sendall(bytes(BALLAST - 1))
            deadline = time.monotonic() + 20
            while before <= set(running.workers()) and time.monotonic() < deadline:
                time.sleep(0.05)
            gone = len(before - set(running.workers()))
            _set_limit(group, 2**40)
            if not gone:
                raise Untried("no worker was killed within 20 s")
            return FaultReport(f"{gone} of {len(before)} workers killed", True)

        return observed(running.port, fault)


@contextmanager
def _create_control_group() -> Iterator[Path]:
    """Create a control group for this benchmark, version 1 or 2."""
    above = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = above / f"engine-health-faults-{os.getpid()}"
    try:
        group.mkdir()
        if not _find_memory_files(group)[0].exists():
            raise OSError("no memory controller")
    except OSError as error:
        raise Untried(f"no control group with a memory limit ({error})") from None
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (above / "cgroup.procs").write_text(pid)
        with suppress(OSError):
            group.rmdir()


def _find_memory_files(group: Path) -> tuple[Path, Path]:
    """Return the files with the memory limit and the memory usage of a group."""
    if (CGROUPS / "memory").is_dir():
        return group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
    return group / "memory.max", group / "memory.current"


def _set_limit(group: Path, size: int) -> None:
    _find_memory_files(group)[0].write_text(str(size))


def _read_usage(group: Path) -> int:
    return int(_find_memory_files(group)[1].read_text())


def descriptors() -> Outcome:
    """Limit the process to 64 open files and open 200 connections."""
    with remembering() as running:

        def fault() -> FaultReport:
            limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, limits[1]))
            held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(CONNECTIONS)]
            time.sleep(HELD_SECONDS)
            open_count = running.descriptors()
            for connection in held:
                connection.close()
            return FaultReport(
                f"{open_count} of {DESCRIPTORS} descriptors in use for {HELD_SECONDS} s", open_count == DESCRIPTORS
            )

        return observed(running.port, fault)
