"""The routes of operation: model description, liveness, readiness and metrics."""

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from model import numerics
from service.api.openapi import document_route
from service.inference.predictor import Predictor
from service.lifecycle import Lifecycle
from service.server.limits import HEADER_BYTES
from service.server.responses import json_response
from service.settings import Settings


def build_router(lifecycle: Lifecycle) -> APIRouter:
    """Return the router of the operational endpoints."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        """Return 200 while the process is running."""
        return {"status": "live"}

    @router.get("/readyz", openapi_extra=document_route(None, None))
    async def readyz() -> Response:
        """Return 200 if a model is verified, otherwise 503."""
        return json_response({"status": "ready", "digest": lifecycle.accepting_predictor().model.digest})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the Prometheus metrics of all workers in text format."""
        text = await asyncio.to_thread(lifecycle.metrics.text)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def build_model_router(lifecycle: Lifecycle) -> APIRouter:
    """Return the router of the model description."""
    router = APIRouter(tags=["model"])

    @router.get("/v1/model", openapi_extra=document_route(None, None))
    async def model() -> Response:
        """Return the manifest of the active model, its digest, its temperature and the limits of this service."""
        return json_response(model_json(lifecycle.ready_predictor(), lifecycle.settings))

    return router


def model_json(predictor: Predictor, limits: Settings) -> dict[str, Any]:
    """Return the manifest, flat, without its golden windows, and the settings and limits of this service."""
    return predictor.model.manifest.model_dump(mode="json", exclude={"golden"}) | {
        "digest": predictor.model.digest,
        "temperature": predictor.temperature,
        "temperature_source": predictor.temperature_source,
        "input_shape": predictor.model.input_shape,
        "deterministic": limits.deterministic,
        "batch_max_difference": predictor.model.batch_max_difference,
        "optimised_graph": predictor.model.optimised_graph,
        "limits": {
            "max_body_bytes": limits.max_body_bytes,
            "max_buffered_bytes": limits.max_buffered_bytes,
            "max_instances": limits.max_instances,
            "max_queue_rows": limits.max_queue_rows,
            "max_queue_seconds": limits.max_queue_seconds,
            "max_batch_rows": limits.max_batch_rows,
            "request_seconds": limits.request_seconds,
            "header_bytes": HEADER_BYTES,
            "temperature": [numerics.MIN_TEMPERATURE, numerics.MAX_TEMPERATURE],
        },
    }
