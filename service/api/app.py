"""The wiring: one factory builds the application from values; the lifespan opens the model; one table maps errors.

Nothing happens at import. Live at once, ready once the artefact proved itself.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors
from service.api import schemas
from service.api.routes import State, build_router, json_response
from service.metrics import Metrics
from service.predictor import Predictor
from service.runtime import open_model
from service.settings import Settings

STATUS: tuple[tuple[type[errors.ServiceError], int], ...] = (
    (errors.NotJson, 400),
    (errors.ClientGone, 400),
    (errors.BodyTooLarge, 413),
    (errors.UnsupportedMediaType, 415),
    (errors.InvalidInput, 422),
    (errors.NotReady, 503),
)
TITLES = {
    400: "Bad request",
    404: "Not found",
    405: "Method not allowed",
    413: "Body too large",
    415: "Unsupported media type",
    422: "Invalid value",
    500: "Internal error",
    503: "Not ready",
}
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})  # other words are one label

log = logging.getLogger("engine_health")


def create_app(settings: Settings, on_rejected: Callable[[str], None]) -> FastAPI:
    """The application. `on_rejected` is told why if the artefact does not prove itself; the caller then stops."""
    metrics = Metrics(CollectorRegistry())
    state = State(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(_open(state, on_rejected))
        yield
        state.predictor = None
        metrics.ready.set(0)
        opening.cancel()

    app = FastAPIOffline(
        title="engine-health",
        version=version("engine-health"),
        summary="Calibrated health and remaining useful life of turbofan engines.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.include_router(build_router(state))
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema

    async def problem(request: Request, error: Exception) -> Response:
        return _problem(request, error, metrics)

    for kind in (errors.ServiceError, HTTPException, Exception):
        app.add_exception_handler(kind, problem)
    app.add_middleware(Measured, metrics=metrics)
    return app


async def _open(state: State, on_rejected: Callable[[str], None]) -> None:
    settings = state.settings
    try:
        model = await asyncio.to_thread(open_model, settings.model, settings.model_digest, settings.threads)
        state.predictor = Predictor(model, state.metrics)
    except errors.ArtefactRejected as error:
        on_rejected(error.detail)
        return
    except Exception as error:  # never unready for ever without a word
        log.exception("the model could not be opened")
        on_rejected(f"{type(error).__name__}: {error}")
        return
    log.info("ready: %s %s, %s", model.manifest.name, model.manifest.version, model.digest)


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        schema.setdefault("components", {}).setdefault("schemas", {}).update(schemas.components())
        app.openapi_schema = schema
    return app.openapi_schema


def _problem(request: Request, error: Exception, metrics: Metrics) -> Response:
    """Any error as an RFC 9457 problem document."""
    headers: dict[str, str] = {}
    faults: tuple[errors.Fault, ...] = ()
    if isinstance(error, errors.ServiceError):
        status = next((code for kind, code in STATUS if isinstance(error, kind)), 500)
        detail, faults = error.detail, error.faults
        if isinstance(error, errors.InputRejected):
            metrics.rejected.labels(error.reason).inc()
    elif isinstance(error, HTTPException):
        status, detail, headers = error.status_code, error.detail, dict(error.headers or {})
    else:
        log.exception("unexpected error on %s", request.url.path, exc_info=error)
        status, detail = 500, "this is a fault of the service; its log says more"
    if status == 503:
        headers["Retry-After"] = "1"
    document = {"type": "about:blank", "title": TITLES.get(status, "Error"), "status": status, "detail": detail}
    if faults:
        document["errors"] = [{"loc": fault.loc, "msg": fault.msg} for fault in faults]
    response = json_response(document, status, "application/problem+json")
    response.headers.update(headers)
    return response


class Measured:
    """Counts and times every request by method, route template and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; anything but HTTP passes unseen."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.http_requests.labels(method, route, str(status)).inc()
            self._metrics.http_duration.labels(route).observe(time.perf_counter() - started)
