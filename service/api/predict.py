"""The route of /v1/predict: telemetry in, calibrated predictions out."""

import time
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.offload import LARGE_BODY, LARGE_RESPONSE, Offloader
from service.api.openapi import ARROW_TABLE, document_route, query_parameters
from service.api.route_index import Endpoint, FastRoute
from service.codecs.arrow import ARROW
from service.codecs.labels import results_json
from service.codecs.predict_request import decode_predict, decode_predict_table
from service.codecs.predictions_json import envelope, prediction_rows
from service.codecs.requests import PredictOptions
from service.ids import prediction_ids
from service.inference.predictions import PredictionResult
from service.inference.predictor import Predictor
from service.lifecycle import Lifecycle
from service.server.body import read_large
from service.server.media_types import JSON, JSON_HEADER, media_type
from service.server.responses import BytesResponse
from service.server.scope import context_of
from service.store.new_predictions import NamedRow

_engine_id = attrgetter("engine_id")  # in C


def build_endpoint(lifecycle: Lifecycle, offloader: Offloader) -> Endpoint:
    """Return the endpoint of /v1/predict."""
    limits = lifecycle.settings

    async def predict(request: Request) -> Response:
        """Predict the calibrated health of engines, and return the loss where a label is given."""
        context = context_of(request.scope)
        is_json = context.headers.get(b"content-type") == JSON_HEADER or media_type(request, (JSON, ARROW)) == JSON
        predictor = lifecycle.predictor or lifecycle.ready_predictor()
        ticket = predictor.admit(context.content_length)
        body = await read_large(request, limits.max_body_bytes, limits.request_seconds)
        predictor = lifecycle.predictor or lifecycle.ready_predictor()
        model = predictor.model
        if not is_json:  # always offloaded: the first one imports pyarrow
            query = request.query_params.multi_items()
            inputs = await offloader.run(lambda: decode_predict_table(body, query, model, limits))
        elif len(body) > LARGE_BODY:
            inputs = await offloader.run(lambda: decode_predict(body, model, limits.max_instances))
        else:
            inputs = decode_predict(body, model, limits.max_instances)
        instances, decoded = inputs.instances, inputs.decoded
        ticket.rows(len(instances))
        prediction = await predictor.predict(
            decoded.telemetry,
            decoded.targets,
            inputs.temperature,
            decoded.imputed,
            partial(getattr, context, "disconnected"),
            inputs.explain,
        )
        ids: Sequence[str | None]
        results: dict[str, Any] = {}
        if decoded.targets is None and set(map(_engine_id, instances)) == {None}:  # nothing to store or to count
            ids = prediction_ids(len(instances), time.time())
        elif (store := lifecycle.store) is not None:
            stored = await store.record_predictions(
                predictor, instances, decoded.telemetry, prediction, decoded.targets
            )
            ids = stored.ids
            if decoded.targets is not None:
                results = results_json(decoded.targets, stored.results, model.manifest.classes)
        else:
            ids = prediction_ids(len(instances), time.time())
            lifecycle.labels.count_submitted(prediction, decoded.targets, predictor.temperature)
        what_if = inputs.temperature is not None
        if len(instances) * len(model.manifest.classes) > LARGE_RESPONSE:
            return await offloader.run(lambda: _respond(predictor, instances, prediction, ids, what_if, results))
        return _respond(predictor, instances, prediction, ids, what_if, results)

    return predict


def _respond(
    predictor: Predictor,
    instances: Sequence[NamedRow],
    prediction: PredictionResult,
    ids: Sequence[str | None],
    what_if: bool,
    results: dict[str, Any],
) -> BytesResponse:
    rows = prediction_rows(predictor.model, instances, prediction, ids)
    return BytesResponse(envelope(predictor, rows, prediction, what_if, results), 200, JSON)


def build_router(predict: Endpoint) -> APIRouter:
    """Return the router of /v1/predict."""
    router = APIRouter(tags=["health"])
    extra = document_route("PredictRequest", "PredictResponse")
    extra["requestBody"]["content"][ARROW] = {"schema": ARROW_TABLE}
    extra["parameters"] = query_parameters(PredictOptions, f"Only for {ARROW}; JSON has it in its body.")
    router.add_api_route("/v1/predict", predict, methods=["POST"], openapi_extra=extra, route_class_override=FastRoute)
    return router
