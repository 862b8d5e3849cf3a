"""The wiring: one factory builds the application from values; the lifespan opens the model and drains at the end.

Nothing happens at import. Live at once, ready once the artefact proved itself.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from service import errors, logs
from service.api import calibration, flights, oip
from service.api.auth import Keys
from service.api.middleware import Edge
from service.api.predict import Aside, build_endpoint, build_router
from service.api.problems import problem
from service.api.route_index import Paths
from service.codecs import requests
from service.console import routes
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.server.body_budget import Buffer
from service.settings import Settings, read_settings
from service.tracing import open_tracing


class Application(NamedTuple):
    """What is served, and within it FastAPI's part, which knows the routes and their documentation."""

    served: ASGIApp
    api: FastAPI


def serve_app() -> ASGIApp:
    """Build the application from the environment for any ASGI server: `uvicorn --factory service.app:serve_app`."""
    settings = read_settings()
    logs.configure(settings)
    return create_app(settings, _exit).served


def create_app(
    settings: Settings,
    on_rejected: Callable[[str], None],
    shared: Path | None = None,
    handle_signals: bool = False,
) -> Application:
    """The application.

    Args:
        settings: every one of them.
        on_rejected: told why if the artefact does not prove itself; the caller then stops.
        shared: the folder in which several workers keep what is theirs together.
        handle_signals: whether SIGTERM drains and SIGHUP reloads the model; other servers have handlers that must stay.
    """
    metrics = Metrics(CollectorRegistry(), shared)
    lifecycle, tracing = Lifecycle(settings, metrics, shared), open_tracing()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(lifecycle.open(on_rejected))
        if handle_signals:
            _on_signals(lifecycle)
        if lifecycle.relieved:
            await lifecycle.proven.wait()  # taking no connections yet: the other workers have a model for them
        yield
        opening.cancel()
        await lifecycle.close()
        if tracing:
            await asyncio.to_thread(tracing.close)

    app = FastAPIOffline(
        title="engine-health",
        version=version("engine-health"),
        summary="Calibrated health and remaining useful life of turbofan engines.",
        lifespan=lifespan,
        redoc_url=None,
    )
    aside = Aside()
    predict, infer = build_endpoint(lifecycle, aside), oip.build_endpoint(lifecycle, aside)
    cycles = flights.build_cycles(lifecycle, aside)
    routers = (
        build_router(lifecycle, aside, predict),
        flights.build_router(lifecycle, aside, cycles),
        calibration.build_router(lifecycle),
        oip.build_router(lifecycle, infer),
    )
    for router in routers:
        app.include_router(router)
    app.include_router(routes.build_router())
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema

    paths = Paths(route for router in (app, *routers) for route in router.routes)

    async def answer_problem(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        response = problem(error, path, metrics)
        if response.status_code == 405:  # the router tells of one route only
            response.headers["Allow"] = paths.allowed(path)
        return response

    for kind in (errors.ServiceError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_problem)
    edge = Edge(app, metrics, Keys(settings), paths, Buffer(settings.max_buffered_bytes), _origins(settings, app))
    return Application(tracing.around(edge) if tracing else edge, app)


def _origins(settings: Settings, app: ASGIApp) -> CORSMiddleware | None:
    """What pages of the listed origins may do, and which headers of an answer they may read."""
    allowed = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if not allowed:
        return None
    shown = [oip.HEADER, "Retry-After", "X-Request-Id"]
    return CORSMiddleware(app, allowed, allow_methods=["*"], allow_headers=["*"], expose_headers=shown)


def _exit(reason: str) -> None:
    """End the process because the model is rejected; every server takes the exit code for a failed start."""
    print(f"engine-health: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _on_signals(lifecycle: Lifecycle) -> None:
    """SIGTERM: unready at once, closed after the drain time. SIGHUP: open the model's path again."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread hears signals
    loop, close = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    kept: set[asyncio.Task[None]] = set()

    def drain() -> None:
        if callable(close):
            loop.call_later(0 if lifecycle.draining else lifecycle.settings.drain_seconds, close, signal.SIGTERM, None)
        lifecycle.drain()

    def reload() -> None:
        if len(kept) > 1:
            return  # one is under way and another waits, which will see whatever there is by then
        task = loop.create_task(lifecycle.reload_quietly())
        kept.add(task)
        task.add_done_callback(kept.discard)

    loop.add_signal_handler(signal.SIGTERM, drain)
    loop.add_signal_handler(signal.SIGHUP, reload)


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        schema.setdefault("components", {}).setdefault("schemas", {}).update(requests.components())
        app.openapi_schema = schema
    return app.openapi_schema
