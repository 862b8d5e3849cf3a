"""The marker of each test, derived from what the test uses.

`browser` needs Chromium, `service` starts a process or a database. `slow` reads C-MAPSS, uses torch, or is marked in
the source (long runs, and limits of time or memory). All other tests are `unit`, and run in one process.
"""

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

PROCESSES = frozenset(
    {
        "running",
        "start",
        "served",
        "postgres",
        "serving",
        "survive_in",
        "watched",
        "connected",
        "recorded",
        "Popen",
        "check_output",
    }
)
PROCESSES_OF_SUBPROCESS = frozenset({"run", "check_call"})
MARKERS = ("browser", "slow", "service", "unit")


def marker_of(item: pytest.Function) -> str:
    """Return the one marker of a test: the first of MARKERS that applies."""
    if "browser" in item.fixturenames:
        return "browser"
    if item.get_closest_marker("slow") or "cmapss_dir" in item.fixturenames or "torch" in vars(item.module):
        return "slow"
    fixtures = [d.func for defs in item._fixtureinfo.name2fixturedefs.values() for d in defs]
    return "service" if any(starts_process(function, set()) for function in (item.function, *fixtures)) else "unit"


def starts_process(function: Callable[..., Any], seen: set[object]) -> bool:
    """Return whether a function of the tests, or one that it names, starts a process."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function in seen or not function.__module__.startswith("tests."):
        return False
    seen.add(function)
    names = set(_names(function.__code__))
    if names & PROCESSES or ("subprocess" in names and names & PROCESSES_OF_SUBPROCESS):
        return True
    return any(starts_process(function.__globals__[name], seen) for name in names if name in function.__globals__)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and the functions inside of it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
