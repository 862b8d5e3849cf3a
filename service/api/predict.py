"""The routes: bytes in, one call of the use case, bytes out. Decides nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from service.api.route_index import FastRoute
from service.codecs import requests
from service.codecs.arrow import ARROW
from service.codecs.labels import results_json
from service.codecs.predict_request import evaluate_json, model_json, read_predict, read_predict_table
from service.codecs.predictions_json import envelope, prediction_rows
from service.ids import prediction_ids
from service.lifecycle import Lifecycle
from service.server.body import JSON, announced, leaving, media_type, read_body, read_large
from service.server.direct import Written

LARGE_BODY = 64 * 1024  # bytes; beyond it the event loop is left free while they are parsed
LARGE_ANSWER = 192  # probabilities of an answer; beyond it the event loop is left free while they are written
Endpoint = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")


class Aside:
    """One thread for what takes long, so that many large bodies wait for each other and not the event loop for them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "aside")

    async def run(self, long: bool, work: Callable[[], Result]) -> Result:
        """Do it aside if it takes long, else at once."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work) if long else work()


def documented(
    request: str | None,
    response: str | None,
    *codes: str,
    problem: tuple[str, str] = ("Problem", "application/problem+json"),
) -> dict[str, Any]:
    """What the OpenAPI document says of a route: schema names, and the problems that it may answer with."""

    def content(name: str, kind: str = JSON) -> dict[str, Any]:
        return {"content": {kind: {"schema": {"$ref": f"#/components/schemas/{name}"}}}}

    refusal = {"description": "Problem", **content(*problem)}
    extra: dict[str, Any] = {"responses": {"200": {"description": "Answer", **(content(response) if response else {})}}}
    always = ("400", "401", "403", "408", "413", "415", "422", "429", "503") if request else ("401", "403", "503")
    extra["responses"] |= dict.fromkeys((*always, *codes), refusal)
    return extra | ({"requestBody": {"required": True, **content(request)}} if request else {})


def json_response(value: Any, status: int = 200, media_type: str = JSON) -> Response:
    """A JSON answer; numpy numbers leave in their shortest form."""
    return Written(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type)


def build_endpoint(lifecycle: Lifecycle, aside: Aside) -> Endpoint:
    """The prediction itself."""
    limits = lifecycle.settings

    async def predict(request: Request) -> Response:
        """Calibrated health of engines, and the loss where a label is given."""
        table = media_type(request, (JSON, ARROW)) == ARROW
        ticket = lifecycle.ready_predictor().admit(announced(request))
        body = await read_large(request, limits.max_body_bytes, limits.request_seconds)
        predictor = lifecycle.ready_predictor()
        model = predictor.model
        if table:  # always aside: the first one imports pyarrow
            query = request.query_params.multi_items()
            asked = await aside.run(True, lambda: read_predict_table(body, query, model, limits))
        else:
            large = len(body) > LARGE_BODY
            asked = await aside.run(large, lambda: read_predict(body, model, limits.max_instances))
        decoded = asked.decoded
        ticket.rows(len(decoded.telemetry))
        found = await predictor.predict(
            decoded.telemetry,
            decoded.targets,
            asked.temperature,
            decoded.imputed,
            leaving(request),
            asked.explain,
        )
        named, what_if = asked.instances, asked.temperature is not None
        ids: Sequence[str | None]
        told: dict[str, Any] = {}
        if lifecycle.remembers:
            memory, targets = lifecycle.memory(), decoded.targets
            ids, results = await memory.remember(predictor, named, decoded.telemetry, found, targets)
            told = results_json(targets, results, model.manifest.classes)
        else:
            ids = prediction_ids(len(named), time.time())
            lifecycle.labels.count_submitted(found, decoded.targets, predictor.temperature)

        def written() -> Response:
            rows = prediction_rows(model, named, found, ids)
            return Written(envelope(predictor, rows, found, what_if, told), 200, JSON)

        return await aside.run(len(named) * len(model.manifest.classes) > LARGE_ANSWER, written)

    return predict


def build_router(lifecycle: Lifecycle, aside: Aside, predict: Endpoint) -> APIRouter:
    """All routes but those of the Open Inference Protocol."""
    router = APIRouter()
    limits = lifecycle.settings
    asked = documented("PredictRequest", "PredictResponse")
    asked["requestBody"]["content"][ARROW] = {"schema": requests.TABLE}
    asked["parameters"] = requests.query_parameters(
        requests.PredictOptions, f"Beside {ARROW}; JSON has it in its body."
    )
    router.add_api_route(
        "/v1/predict",
        predict,
        methods=["POST"],
        openapi_extra=asked,
        tags=["health"],
        route_class_override=FastRoute,
    )

    @router.post("/v1/evaluate", openapi_extra=documented("EvaluateRequest", "EvaluateResponse"), tags=["health"])
    async def evaluate(request: Request) -> Response:
        """Cross-entropy and calibration of any logits; needs no telemetry and feeds no calibration."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        classes = lifecycle.ready_predictor().model.manifest.classes
        return await aside.run(
            len(body) > LARGE_BODY, lambda: json_response(evaluate_json(body, classes, limits.max_instances))
        )

    @router.get("/v1/model", openapi_extra=documented(None, None), tags=["model"])
    async def model() -> Response:
        """The manifest of the model that answers, its digest, its active temperature and the limits of this service."""
        return json_response(model_json(lifecycle.ready_predictor(), limits))

    @router.get("/livez", tags=["operations"])
    async def livez() -> dict[str, str]:
        """The process runs."""
        return {"status": "live"}

    @router.get("/readyz", openapi_extra=documented(None, None), tags=["operations"])
    async def readyz() -> Response:
        """A model has proved itself; send traffic."""
        return json_response({"status": "ready", "digest": lifecycle.accepting().model.digest})

    @router.get("/metrics", response_class=PlainTextResponse, tags=["operations"])
    async def metrics() -> Response:
        """Prometheus metrics, text format, of all workers."""
        text = await asyncio.to_thread(lifecycle.metrics.text)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
