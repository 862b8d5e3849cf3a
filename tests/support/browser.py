"""Debian's Chromium for tests, which records errors, and a fleet of NASA's engines."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from model.data import cmapss
from tests.support.processes import start

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ROWS = 200  # flights per request
_REFUSED = re.compile(r"Failed to load resource: .*?(?:status of (\d+)|net::(\w+))")


@dataclass
class Watched:
    """A page with its console errors, failed requests and requests to other hosts."""

    page: Page
    home: str
    errors: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # statuses of failed requests, which browsers log as errors
    outside: list[str] = field(default_factory=list)

    def open(self, path: str = "") -> Page:
        """Go to a page of the console."""
        self.page.goto(self.home + path)
        return self.page

    def on_console(self, message: ConsoleMessage) -> None:
        """Record errors and warnings."""
        if message.type in ("error", "warning"):
            match = _REFUSED.match(message.text)
            (self.refused if match else self.errors).append(match[1] or match[2] if match else message.text)

    def on_request(self, request: Request) -> None:
        """Record requests to other hosts."""
        if not request.url.startswith((self.home, "data:")):
            self.outside.append(request.url)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser during the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched(browser: Browser, home: str, **context: Any) -> Iterator[Watched]:
    """Open a page in a new context, without keys or settings of other pages."""
    opened = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB"} | context)
    try:
        opened.set_default_timeout(15_000)
        watch = Watched(opened.new_page(), home)
        watch.page.on("console", watch.on_console)
        watch.page.on("pageerror", lambda error: watch.errors.append(str(error)))
        watch.page.on("request", watch.on_request)
        yield watch
    finally:
        opened.close()


def absent() -> str | None:
    """Return why there is no browser, or None if there is one."""
    return None if CHROMIUM.exists() else f"no browser at {CHROMIUM}: apt-get install chromium"


def in_ci() -> bool:
    """Return whether tests run in CI, where none may be skipped."""
    return os.environ.get("CI") == "true"


def fly_nasas(client: httpx.Client, folder: Path, subset: str, ended: int, running: int, flights: int) -> None:
    """Send flights of NASA's training engines as a collector does.

    Engines that fail send `flights` flights spread over their lives. Running ones send the last `flights` of a part.
    """
    for k, history in enumerate(cmapss.read_train(folder, subset)[: ended + running]):
        n = len(history.cycle)
        if k < ended:
            indices = np.unique(np.linspace(0, n - 1, flights).astype(int))
        else:
            indices = np.arange(n)[: n - 2 - (37 * k) % 130][-flights:]  # each engine ends at another cycle
        rows = [
            {"engine_id": history.engine_id, "cycle": int(history.cycle[i]), "telemetry": history.telemetry[i].tolist()}
            for i in indices
        ]
        for begin in range(0, len(rows), ROWS):
            response = client.post("/v1/cycles", json={"cycles": rows[begin : begin + ROWS]})
            assert response.status_code == 200, response.text
        if k < ended:
            end = {"engine_id": history.engine_id, "failed_at_cycle": int(history.cycle[-1])}
            assert client.post("/v1/outcomes", json=end).status_code == 200


def up(port: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    """Start a service on a given port, and return when it is ready."""
    process = start("serve", "--port", port, **environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if 200 == httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code:
                return process
        except httpx.TransportError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


def down(process: "subprocess.Popen[str]") -> None:
    """Stop the process of a service."""
    process.terminate()
    process.communicate(timeout=30)
