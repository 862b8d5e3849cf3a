"""The service for one part of the tests: memory, metrics and processes; and the result line of a part."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import load
from benchmarks.endurance.client import request
from benchmarks.peers import INFER, ROOT
from benchmarks.serving import base, command

PREDICT, EVALUATE = "/v1/predict", "/v1/evaluate"
MIB = 2**20


@dataclass(frozen=True)
class Line:
    """One requirement: the action, the observation, the required result, and whether it was met."""

    done: str
    seen: str
    promised: str
    kept: bool
    figures: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A running service: its port and the id of the started process."""

    port: int
    pid: int

    def counted(self) -> dict[str, float]:
        """Return every sample of /metrics by name and labels."""
        lines = load.get(base(self.port) + "/metrics")[1].decode().splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}

    def alive(self) -> bool:
        """Return whether the started process still runs."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None

    def memory(self, entry: str = "VmRSS") -> float:
        """Return the resident memory of the process in MiB, or its peak since `forget_peak` for "VmHWM"."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(entry))) / 1024

    def settled_memory(self) -> float:
        """Return the resident memory in MiB after 1 s, because a request is released after its response is sent."""
        time.sleep(1)
        return self.memory()

    def forget_peak(self) -> None:
        """Reset the peak of resident memory."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def descriptors(self) -> int:
        """Return the number of open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def workers(self) -> list[int]:
        """Return the ids of the worker processes."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in _read_command_line(int(pid))]

    def stopped(self, seconds: float) -> int:
        """Send SIGTERM, wait, and return the exit code.

        Raises:
            TimeoutError: the process still runs after `seconds`.
        """
        os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # WNOWAIT leaves the process to its parent, which reaps it later
            exit_info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if exit_info is not None:
                return exit_info.si_status if exit_info.si_code == os.CLD_EXITED else -exit_info.si_status
            time.sleep(0.05)
        raise TimeoutError(f"still running {seconds:g} s after SIGTERM")


@contextmanager
def service(environment: Mapping[str, str] | None = None, **settings: object) -> Iterator[Running]:
    """Start the service on its core with one inference thread and default logging. Settings are in lower case."""
    port = load.free_port()
    variables = {f"ENGINE_HEALTH_{key.upper()}": str(value) for key, value in ({"threads": 1} | settings).items()}
    arguments = [word for word in command(port) if word not in ("--drain-seconds", "0")]
    with load.served(
        arguments, {**variables, **(environment or {})}, load.SERVER_CORE, base(port) + "/readyz", ROOT
    ) as pid:
        yield Running(port, pid)


def windows_json(rows: int, flights: int = 0) -> bytes:
    """Return a request to `/v1/predict`. `flights`: number of newest rows per window that are sent, 0 for all."""
    return request(PREDICT, load.predict_json(load.windows(rows)[:, -flights:]), load.JSON_HEADERS)


def windows_binary(rows: int) -> bytes:
    """Return an Open Inference Protocol request with binary input and output."""
    return request(INFER, *load.oip_binary(load.windows(rows)))


def say(text: str) -> None:
    """Print progress to standard error."""
    print(f"  {text}", file=sys.stderr, flush=True)


def _read_command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # the process ended
        return b""
