"""Start the service with one worker or many.

Several workers share a folder. Each keeps its metrics in files named by its slot; the next worker of that slot
continues them.
"""

import gc
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE

from service import logs
from service.app import create_app
from service.metrics import share_between_workers
from service.server import malloc
from service.server.config import uvicorn_config
from service.server.protocol import BoundedProtocol
from service.server.supervisor import Supervisor, end_with_supervisor, take_slot
from service.settings import Settings


def serve_one(settings: Settings) -> str | None:
    """Serve in this process until a signal stops it; return the reason if the model was rejected."""
    reasons: list[str] = []

    def stop(reason: str) -> None:
        reasons.append(reason)
        server.should_exit = True

    server = uvicorn.Server(uvicorn_config(settings, app=create_app(settings, stop, handle_signals=True).served))
    server.run()
    return reasons[0] if reasons else None


def serve_many(settings: Settings) -> int:
    """Serve with several workers until a signal stops them; return the exit code."""
    gc.enable()  # the command disabled it until a model is opened, and none is opened in this process
    shared = Path(tempfile.mkdtemp(prefix="engine-health-"))
    try:
        config = uvicorn_config(settings, app=partial(worker_app, settings, shared, os.getpid()), factory=True)
        supervisor = Supervisor(config, [config.bind_socket()])
        supervisor.run()
        return 1 if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes) else 0
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def worker_app(settings: Settings, shared: Path, supervisor: int) -> ASGIApp:
    """Return the application of one worker; called in the process of the worker.

    Args:
        settings: all settings.
        shared: the folder that the workers share.
        supervisor: process id of the supervisor.
    """
    malloc.configure()
    logs.configure(settings)
    BoundedProtocol.seconds = settings.request_seconds
    slot = take_slot(shared, settings.workers * 2)
    share_between_workers(shared, slot)

    def give_up(reason: str) -> None:
        with suppress(FileExistsError):  # one line, although every worker rejects the model
            (shared / "given-up").touch(exist_ok=False)
            print(f"engine-health: {reason}", file=sys.stderr, flush=True)
        os._exit(STARTUP_FAILURE)  # on this exit code the supervisor stops and does not restart the worker

    end_with_supervisor(supervisor)
    return create_app(settings, give_up, shared, handle_signals=True).served
