"""The routes: bytes in, one call of the use case, bytes out. Decides nothing."""

import time
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import orjson
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from service.api.calls import evaluate_json, model_json, predict_json
from service.errors import BodyTooLarge, ClientGone, NotReady, UnsupportedMediaType
from service.metrics import Metrics
from service.predictor import Predictor
from service.settings import Settings

LARGE_BODY = 64 * 1024  # bytes; about ten windows, a millisecond of work: beyond it the event loop is left free


class State:
    """What the routes share; the predictor is None until a model has proved itself."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.predictor: Predictor | None = None

    def ready_predictor(self) -> Predictor:
        """The predictor.

        Raises:
            NotReady: no model yet.
        """
        if self.predictor is None:
            raise NotReady("no model has proved itself yet")
        return self.predictor


def _documented(request: str | None, response: str | None) -> dict[str, Any]:
    def content(name: str, kind: str = "application/json") -> dict[str, Any]:
        return {"content": {kind: {"schema": {"$ref": f"#/components/schemas/{name}"}}}}

    problem = {"description": "Problem", **content("Problem", "application/problem+json")}
    extra: dict[str, Any] = {"responses": {"200": {"description": "Answer", **(content(response) if response else {})}}}
    codes = ("400", "413", "415", "422", "503") if request else ("503",)
    extra["responses"] |= dict.fromkeys(codes, problem)
    return extra | ({"requestBody": {"required": True, **content(request)}} if request else {})


async def read_json(request: Request, limit: int) -> bytes:
    """The body of a JSON request, refused before it is read where its headers allow.

    Raises:
        UnsupportedMediaType: a content type other than JSON, or an encoded body.
        BodyTooLarge: more bytes than the limit, announced or sent.
        ClientGone: the client left before its body was whole.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(f"content type {kind[:80]!r}: this call reads application/json")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"content encoding {encoding[:80]!r}: this call reads plain bodies")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise BodyTooLarge(f"{announced} bytes, at most {limit} are read")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise BodyTooLarge(f"more than {limit} bytes")
    except ClientDisconnect:
        raise ClientGone("the client left before its body was whole") from None
    return bytes(body)


async def answer(
    body: bytes, work: Callable[[bytes], dict[str, Any]], waited: Callable[[float], None] = lambda _: None
) -> Response:
    """Run the work on a body, off the event loop when it is large; `waited` is told the seconds before it began."""
    read = time.perf_counter()

    def begin() -> Response:
        waited(time.perf_counter() - read)
        return json_response(work(body))

    return await anyio.to_thread.run_sync(begin) if len(body) > LARGE_BODY else begin()


def json_response(value: Any, status: int = 200, media_type: str = "application/json") -> Response:
    """A JSON answer; numpy numbers leave in their shortest form."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type=media_type)


def build_router(state: State) -> APIRouter:
    """All routes over one state."""
    router = APIRouter()
    limits = state.settings

    @router.post("/v1/predict", openapi_extra=_documented("PredictRequest", "PredictResponse"), tags=["health"])
    async def predict(request: Request) -> Response:
        """Calibrated health of engines, and the loss where a label is given."""
        body = await read_json(request, limits.max_body_bytes)
        predictor = state.ready_predictor()
        return await answer(
            body,
            lambda content: predict_json(content, predictor, limits.max_instances),
            state.metrics.queue_duration.observe,
        )

    @router.post("/v1/evaluate", openapi_extra=_documented("EvaluateRequest", "EvaluateResponse"), tags=["health"])
    async def evaluate(request: Request) -> Response:
        """Cross-entropy and calibration of any logits; needs no telemetry and feeds no metrics."""
        body = await read_json(request, limits.max_body_bytes)
        classes = state.ready_predictor().model.manifest.classes
        return await answer(body, lambda content: evaluate_json(content, classes, limits.max_instances))

    @router.get("/v1/model", openapi_extra=_documented(None, None), tags=["model"])
    async def model() -> Response:
        """The manifest of the model that answers, its digest, its active temperature and the limits of this service."""
        return json_response(model_json(state.ready_predictor(), limits))

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez", tags=["operations"])
    async def livez() -> dict[str, str]:
        """The process runs."""
        return {"status": "live"}

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", openapi_extra=_documented(None, None), tags=["operations"])
    async def readyz() -> Response:
        """A model has proved itself; send traffic."""
        return json_response({"status": "ready", "digest": state.ready_predictor().model.digest})

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Prometheus metrics, text format."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
