"""`make demo`: a service and a fleet for it, in one command. Ctrl-C ends both.

    python -m service.replay.demo [FLAGS OF REPLAY]

The service listens where `ENGINE_HEALTH_HOST` and `_PORT` say, and its memory is build/demo.db, new each time. Forty
engines of any age fly, each that fails makes room for a new one, and thirty failed before, so that there is something
to see at once.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from time import monotonic, sleep

from service.errors import ServiceError
from service.replay.options import add_to, options_of, url_of, wrong
from service.replay.run import replay
from service.settings import PREFIX, Settings, read_settings

MEMORY = Path("build/demo.db")
FLEET = ("--endless", "--engines", "40", "--past", "30")
START_SECONDS = 60.0


def main(flags: list[str]) -> int:
    """Run both until told to stop; 1 if either fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that is closed ends both; not under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    parser = argparse.ArgumentParser("demo", description="A service, and a simulated fleet that flies for it.")
    add_to(parser)
    try:
        settings = read_settings()
        options = options_of(vars(parser.parse_args([*FLEET, *flags, "--url", url_of(settings)])), settings)
        if mistake := wrong(options):
            parser.error(mistake)
        _check_free(settings)
        service = _serve()
        try:
            _wait(service, options.url)
            print(f"The console is at {options.url}/ (Ctrl-C ends the demo)", flush=True)
            return replay(options)
        finally:
            service.terminate()
            service.wait()
    except KeyboardInterrupt:
        return 0
    except ServiceError as error:
        print(f"demo: {error.detail}", file=sys.stderr)
        return 1


def _check_free(settings: Settings) -> None:
    """Refuse an address at which something answers already: it would be taken for our service."""
    try:
        socket.create_connection((settings.host, settings.port), timeout=1).close()
    except OSError:
        return
    raise ServiceError(f"port {settings.port} is taken; {PREFIX}PORT=8001 make demo takes another one")


def _serve() -> "subprocess.Popen[bytes]":
    MEMORY.parent.mkdir(exist_ok=True)
    for path in MEMORY.parent.glob(MEMORY.name + "*"):
        path.unlink()
    quiet = {f"{PREFIX}LOG_LEVEL": "error", f"{PREFIX}LOG_FORMAT": "text", f"{PREFIX}DRAIN_SECONDS": "0"}
    environment = quiet | dict(os.environ) | {f"{PREFIX}DATABASE_URL": f"sqlite:///{MEMORY}"}
    command = [sys.executable, "-m", "service.cli", "serve"]
    return subprocess.Popen(command, env=environment, start_new_session=True)  # Ctrl-C is ours to pass on


def _wait(service: "subprocess.Popen[bytes]", url: str) -> None:
    """Return when the service is ready; raises ServiceError if it ended, or is not for long."""
    until = monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine
    while service.poll() is None and monotonic() < until:
        try:
            direct.open(f"{url}/readyz", timeout=5).close()
            return
        except OSError:
            sleep(0.1)
    raise ServiceError("the service did not start")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
