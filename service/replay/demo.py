"""`make demo`: start a service and replay a fleet to it, in one command. Ctrl-C stops both.

    python -m service.replay.demo [FLAGS OF REPLAY]

The service listens at `ENGINE_HEALTH_HOST` and `ENGINE_HEALTH_PORT`. Its store is build/demo.db, new in each run.
The fleet has 40 engines of any age, a new one for each that fails, and 30 engines that failed before. So the console
has data from the start.
"""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from time import monotonic, sleep

from service.codecs.arguments import ArgumentParser
from service.errors import ServiceError
from service.replay.options import add_replay_flags, build_options, find_flag_conflict, service_url
from service.replay.run import replay_fleet
from service.settings import PREFIX, Settings, read_settings

STORE_PATH = Path("build/demo.db")
FLEET_FLAGS = ("--endless", "--engines", "40", "--past", "30")
DEMO_FLAGS = (
    f"The demo begins with the flags {' '.join(FLEET_FLAGS)}; other values of --engines and --past replace these."
)
START_SECONDS = 60.0


def main(flags: list[str]) -> int:
    """Run both until a signal stops them. Return 1 if either fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a closed terminal stops both, except under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    parser = ArgumentParser("demo", description=f"Start a service and replay a fleet to it. {DEMO_FLAGS}")
    add_replay_flags(parser)
    try:
        settings = read_settings()
        arguments = [*FLEET_FLAGS, *flags, "--url", service_url(settings)]
        options = build_options(vars(parser.parse_arguments(arguments)), settings)
        if conflict := find_flag_conflict(options):
            parser.error(conflict)
        _check_port_is_free(settings)
        service = _start_service()
        try:
            _wait_until_ready(service, options.url)
            print(f"The console is at {options.url}/ (Ctrl-C stops the demo)", flush=True)
            return replay_fleet(options, hint="the next demo starts with an empty store")
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # `make` passes Ctrl-C on, so it may arrive twice
            service.terminate()
            service.wait()
    except KeyboardInterrupt:
        return 0
    except ServiceError as error:
        print(f"demo: {error.detail}", file=sys.stderr)
        return 1


def _check_port_is_free(settings: Settings) -> None:
    """Reject an address that another process uses: the replay would send to that process."""
    try:
        socket.create_connection((settings.host, settings.port), timeout=1).close()
    except OSError:
        return
    raise ServiceError(f"port {settings.port} is in use; choose another one: {PREFIX}PORT=8001 make demo")


def _start_service() -> "subprocess.Popen[bytes]":
    STORE_PATH.parent.mkdir(exist_ok=True)
    for path in STORE_PATH.parent.glob(STORE_PATH.name + "*"):
        path.unlink()
    defaults = {f"{PREFIX}LOG_LEVEL": "error", f"{PREFIX}LOG_FORMAT": "text", f"{PREFIX}DRAIN_SECONDS": "0"}
    environment = defaults | dict(os.environ) | {f"{PREFIX}DATABASE_URL": f"sqlite:///{STORE_PATH}"}
    command = [sys.executable, "-m", "service.cli", "serve"]
    return subprocess.Popen(command, env=environment, start_new_session=True)  # this process forwards Ctrl-C


def _wait_until_ready(service: "subprocess.Popen[bytes]", url: str) -> None:
    """Return when the service is ready. Raise ServiceError if it exits or is not ready in time."""
    deadline = monotonic() + START_SECONDS
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # the service is local, so a proxy must not be used
    while service.poll() is None and monotonic() < deadline:
        try:
            opener.open(f"{url}/readyz", timeout=5).close()
            return
        except OSError:
            sleep(0.1)
    raise ServiceError(f"the service did not start within {START_SECONDS:g} s; its log is above")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
