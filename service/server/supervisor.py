"""Supervision of several workers: their slots, signals and termination.

Each worker holds a slot, the lowest number whose file lock is free, until its process ends. The kernel frees the lock
of a killed worker.
"""

import ctypes
import fcntl
import os
import signal
import sys
from pathlib import Path

from uvicorn.supervisors import Multiprocess

PR_SET_PDEATHSIG = 1  # of prctl(2)


def take_slot(shared: Path, slots: int) -> int:
    """Return the lowest free slot, and hold it until this process ends.

    Raises:
        RuntimeError: no slot is free.
    """
    for slot in range(slots):
        lock = os.open(shared / f"slot-{slot}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return slot  # the descriptor stays open, and with it the lock
    raise RuntimeError(f"all {slots} slots are taken")


def end_with_supervisor(supervisor: int) -> None:
    """End this worker when the process `supervisor` is killed: nothing else would stop it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        os._exit(0)


class Supervisor(Multiprocess):
    """uvicorn's supervisor, except that it passes SIGHUP to the workers, which reload the model and do not restart."""

    def keep_subprocess_alive(self) -> None:
        """Close the worker's end of each pipe here first: otherwise a worker killed while it starts appears busy."""
        for process in self.processes:
            process.child_conn.close()
        super().keep_subprocess_alive()

    def terminate_all(self) -> None:
        """Stop the workers, then close the sockets: nothing would accept later connections."""
        super().terminate_all()
        for listening in self.sockets:
            listening.close()

    def handle_hup(self) -> None:
        """Pass SIGHUP to the workers that handle it. It would end one that is still starting."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None and _handles_hup(process.pid):
                os.kill(process.pid, signal.SIGHUP)


def _handles_hup(pid: int) -> bool:
    """Return whether a process has a handler for SIGHUP; true where that is unknown."""
    try:
        caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    except (OSError, IndexError):
        return sys.platform != "linux"
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)
