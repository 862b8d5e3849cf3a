"""The routes of labels: ground truth by row, and the failure of an engine."""

from fastapi import APIRouter, Request, Response

from service.api.offload import LARGE_BODY, Offloader
from service.api.openapi import document_route
from service.api.requests import OutcomeRequest
from service.codecs.parse import parse
from service.codecs.store_json import labels_json
from service.codecs.store_requests import decode_label_rows
from service.errors import Conflict
from service.lifecycle import Lifecycle
from service.server.body import read_body
from service.server.media_types import JSON, media_type
from service.server.responses import json_response


def build_router(lifecycle: Lifecycle, offloader: Offloader) -> APIRouter:
    """Return the router of labels and outcomes."""
    router = APIRouter(tags=["store"])
    limits = lifecycle.settings

    @router.post("/v1/labels", openapi_extra=document_route("LabelsRequest", "LabelsResponse", "409", "501"))
    async def labels(request: Request) -> Response:
        """Store labels, by prediction or by engine and cycle, before or after the prediction."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        store, classes = lifecycle.require_store(), lifecycle.ready_predictor().model.manifest.classes
        rows = await offloader.run_if(
            len(body) > LARGE_BODY, lambda: decode_label_rows(body, classes, limits.max_instances)
        )
        recorded = await store.record_labels(rows)
        return json_response(labels_json(rows, recorded.results, classes))

    @router.post("/v1/outcomes", openapi_extra=document_route("OutcomeRequest", "OutcomeResponse", "409", "501"))
    async def outcomes(request: Request) -> Response:
        """Store the failure of an engine, which labels its stored history and later predictions of it."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        store, submitted = lifecycle.require_store(), parse(body, OutcomeRequest)
        engine, cycle = submitted.engine_id, submitted.failed_at_cycle
        outcome = await store.record_outcome(engine, cycle, submitted.revise)
        if outcome.result == "conflict":
            raise Conflict(
                f"engine {engine!r} is stored as failed at cycle {outcome.failed_at}, not {cycle}; "
                'send "revise": true to replace it',
                results=[{"result": "conflict", "given": cycle, "known": outcome.failed_at}],
            )
        result = {"result": outcome.result, "labelled": outcome.labelled}
        return json_response({"engine_id": engine, "failed_at_cycle": cycle} | result)

    return router
