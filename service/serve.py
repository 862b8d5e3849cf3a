"""Several serving processes behind one port: who they are, what they share, and how they are kept alive.

Each worker takes a slot, the lowest number whose lock is free, for as long as it lives; the kernel frees the lock of
one that was killed. What it counts is kept in files named by its slot: whoever comes next goes on counting there.
"""

import ctypes
import fcntl
import gc
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from service import logs
from service.app import create_app
from service.metrics import share_between_workers
from service.server import malloc
from service.server.protocol import BoundedProtocol
from service.settings import Settings

HUNG_SECONDS = 60  # a worker silent for so long is hung and not busy; uvicorn's own five seconds kill busy ones
GRACE_SECONDS = 10  # after draining, for those who are still being answered
KEEP_ALIVE_SECONDS = 30


def configuration(settings: Settings, **more: object) -> uvicorn.Config:
    """How uvicorn serves, one worker or many."""
    BoundedProtocol.seconds = settings.request_seconds
    return uvicorn.Config(
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        loop="service.server.event_loop:Loop",
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody asks who the client is
        workers=settings.workers,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_worker_healthcheck=HUNG_SECONDS,
        **more,  # type: ignore[arg-type]  # app and factory
    )


def serve_many(settings: Settings) -> int:
    """Serve with several workers until told to stop; returns the exit code."""
    gc.enable()  # whoever started without: no model is opened here
    shared = Path(tempfile.mkdtemp(prefix="engine-health-"))
    try:
        config = configuration(settings, app=partial(worker_app, settings, shared, os.getpid()), factory=True)
        supervisor = Supervisor(config, [config.bind_socket()])
        supervisor.run()
        return 1 if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes) else 0
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def worker_app(settings: Settings, shared: Path, supervisor: int) -> ASGIApp:
    """The application of one worker; called in the worker's own process."""
    malloc.give_back()
    logs.configure(settings)
    BoundedProtocol.seconds = settings.request_seconds
    slot = take_slot(shared, settings.workers * 2)
    share_between_workers(shared, slot)

    def give_up(reason: str) -> None:
        with suppress(FileExistsError):  # one line, whoever else finds the same
            (shared / "given-up").touch(exist_ok=False)
            print(f"engine-health: {reason}", file=sys.stderr, flush=True)
        os._exit(STARTUP_FAILURE)  # the supervisor takes this for a reason to stop, not to try again

    _end_with(supervisor)
    return create_app(settings, give_up, shared, handle_signals=True).served


def take_slot(shared: Path, most: int) -> int:
    """The lowest slot that nobody holds; held until this process ends.

    Raises:
        RuntimeError: all are taken.
    """
    for slot in range(most):
        lock = os.open(shared / f"slot-{slot}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return slot  # the descriptor stays open, and with it the lock
    raise RuntimeError(f"all {most} slots are taken")


def _end_with(supervisor: int) -> None:
    """Be told to stop when the supervisor is killed: nobody else would ever stop this worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != supervisor:
        os._exit(0)


class Supervisor(Multiprocess):
    """uvicorn's, but that SIGHUP is the workers' to hear: they open the model again, nobody is started anew."""

    def keep_subprocess_alive(self) -> None:
        """Look after the workers. A worker's end of its pipe is its own: else one killed while it starts seems busy."""
        for process in self.processes:
            process.child_conn.close()
        super().keep_subprocess_alive()

    def terminate_all(self) -> None:
        """Stop the workers, and listen no longer than they do: nobody would ever accept who connects after that."""
        super().terminate_all()
        for listening in self.sockets:
            listening.close()

    def handle_hup(self) -> None:
        """Pass it on; who is only starting has no model yet that could be opened again, and would be ended by it."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None and _hears(process.pid):
                os.kill(process.pid, signal.SIGHUP)


def _hears(pid: int) -> bool:
    """Whether a process has a handler for SIGHUP; where nobody can tell, it is taken to have one."""
    try:
        caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    except (OSError, IndexError):
        return sys.platform != "linux"
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)
