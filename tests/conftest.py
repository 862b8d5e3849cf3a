"""Fixtures shared by all tests."""

import os
import shutil
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from playwright.sync_api import Browser

from model.contract import Manifest
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.windows import Readings
from tests.support.markers import marker_of
from tests.support.processes import Service, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser
settings.register_profile("house", deadline=None)  # a slow machine must not fail a test
settings.load_profile("house")
for ignored in (signal.SIGINT, signal.SIGHUP):  # processes of tests would inherit what `nohup` ignores
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its marker, so that `-m unit` selects the tests that need no process."""
    for item in items:
        if isinstance(item, pytest.Function):
            item.add_marker(marker_of(item))


@pytest.fixture(scope="session")
def cmapss_dir() -> Path:
    """Return the folder of NASA's files. Without them a test is skipped; in CI it fails."""
    folder = cmapss.data_folder()
    if not any(folder.glob("train_FD001.txt*")):
        message = f"no C-MAPSS in {folder}: set CMAPSS_DIR or run `make data`"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder.resolve()


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """Return the manifest of the committed artefact."""
    return open_artefact(ARTEFACT)[1]


@pytest.fixture(scope="session")
def windows(manifest: Manifest) -> Readings:
    """Return the golden windows of the artefact, of shape (4, window, 17)."""
    return np.array([golden.telemetry for golden in manifest.golden], dtype=np.float32)


@pytest.fixture(scope="session")
def programs() -> None:
    """Require Debian's Prometheus. Without it a test is skipped; in CI it fails."""
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    message = "no prometheus and promtool (Debian: apt-get install prometheus)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Yield one browser. Without it a test is skipped; in CI it fails."""
    from tests.support.browser import (
        absent,
        chromium,
        in_ci,  # imported here because few tests need it
    )

    missing = absent()
    if missing and in_ci():
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    with chromium() as chrome:
        yield chrome


@pytest.fixture(scope="module", params=["simdjson", "portable"])
def each_parser(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the tests with each of the two parsers of JSON numbers; simdjson only where it is installed."""
    from service.codecs import number_parser  # imported here because few tests need it

    if request.param == "simdjson" and find_spec("simdjson") is None:
        pytest.skip("simdjson is not installed: it has no wheel for this Python")
    usual, make = number_parser.active, {"simdjson": number_parser.SimdjsonParser}
    number_parser.active = make.get(request.param, number_parser.PortableParser)()
    try:
        yield
    finally:
        number_parser.active = usual


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Yield one service with the committed artefact, for all tests that leave its state unchanged."""
    with running() as started:
        yield started
