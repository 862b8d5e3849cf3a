"""Build the application: one factory for all parts; the lifespan opens the model and drains at the end.

Nothing happens at import. The service is live immediately and ready once the model is verified.
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
from typing import NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from service import errors, logs
from service.api import calibration, engines, evaluate, flights, labels, oip, operations, predict
from service.api.auth import ApiKeys
from service.api.middleware import RequestMiddleware
from service.api.offload import Offloader
from service.api.openapi import openapi_schema
from service.api.problems import problem
from service.api.route_index import RouteIndex
from service.console import routes
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.server.body_budget import BodyBudget
from service.settings import Settings, read_settings
from service.tracing import open_tracing


class Application(NamedTuple):
    """The ASGI application, and the FastAPI application inside, which has the routes and their documentation."""

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
    """Return the application.

    Args:
        settings: all settings.
        on_rejected: called with the reason if the model is rejected; the caller then stops.
        shared: the folder that several workers share; None with one worker.
        handle_signals: whether SIGTERM drains and SIGHUP reloads the model; other servers have handlers that must stay.
    """
    metrics = Metrics(CollectorRegistry(), shared)
    lifecycle, tracing = Lifecycle(settings, metrics, shared), open_tracing()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(lifecycle.open(on_rejected))
        if handle_signals:
            _handle_signals(lifecycle)
        if lifecycle.peers_serving:
            await lifecycle.verified.wait()  # accepts no connections yet: the other workers serve
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
    offloader = Offloader()
    routers = (
        predict.build_router(predict.build_endpoint(lifecycle, offloader)),
        evaluate.build_router(lifecycle, offloader),
        operations.build_model_router(lifecycle),
        operations.build_router(lifecycle),
        flights.build_router(flights.build_endpoint(lifecycle, offloader)),
        labels.build_router(lifecycle, offloader),
        engines.build_router(lifecycle, offloader),
        calibration.build_router(lifecycle),
        oip.build_router(lifecycle, oip.build_endpoint(lifecycle, offloader)),
    )
    for router in routers:
        app.include_router(router)
    app.include_router(routes.build_router())
    app.openapi = lambda: openapi_schema(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema

    index = RouteIndex(route for router in (app, *routers) for route in router.routes)

    async def respond_with_problem(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        response = problem(error, path, metrics)
        if response.status_code == 405:  # the router names the methods of one route only
            response.headers["Allow"] = index.allowed_methods(path)
        return response

    for kind in (errors.ServiceError, HTTPException, Exception):
        app.add_exception_handler(kind, respond_with_problem)
    budget, cors = BodyBudget(settings.max_buffered_bytes), _cors(settings, app)
    middleware = RequestMiddleware(app, metrics, ApiKeys(settings), index, budget, cors)
    return Application(tracing.around(middleware) if tracing else middleware, app)


def _cors(settings: Settings, app: ASGIApp) -> CORSMiddleware | None:
    """Return the rules for pages of other origins: what they may send, and which response headers they may read."""
    allowed = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if not allowed:
        return None
    readable = [oip.HEADER, "Retry-After", "X-Request-Id"]
    return CORSMiddleware(app, allowed, allow_methods=["*"], allow_headers=["*"], expose_headers=readable)


def _exit(reason: str) -> None:
    """End the process because the model is rejected; every server takes the exit code for a failed start."""
    print(f"engine-health: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _handle_signals(lifecycle: Lifecycle) -> None:
    """Handle signals. SIGTERM: unready immediately, closed after the drain time. SIGHUP: reload the model."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread receives signals
    loop, close = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    reloads: set[asyncio.Task[None]] = set()

    def drain() -> None:
        if callable(close):
            loop.call_later(0 if lifecycle.draining else lifecycle.settings.drain_seconds, close, signal.SIGTERM, None)
        lifecycle.drain()

    def reload() -> None:
        if len(reloads) > 1:
            return  # one runs and another waits, which will read the newest file
        task = loop.create_task(lifecycle.reload_quietly())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGTERM, drain)
    loop.add_signal_handler(signal.SIGHUP, reload)
