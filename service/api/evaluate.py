"""The route and use case of /v1/evaluate: losses and calibration of logits."""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from model import numerics
from model.numerics import Floats
from service.api.offload import LARGE_BODY, Offloader
from service.api.openapi import document_route
from service.codecs.faults import invalid_input
from service.codecs.predict_request import EvaluateInputs, decode_evaluate
from service.lifecycle import Lifecycle
from service.server.body import read_body
from service.server.media_types import JSON, media_type
from service.server.responses import json_response

PROBABILITY_TOLERANCE = 1e-3  # how near to 1 a row of "logits" in 0..1 must sum to look like probabilities


def build_router(lifecycle: Lifecycle, offloader: Offloader) -> APIRouter:
    """Return the router of /v1/evaluate."""
    router = APIRouter(tags=["health"])
    limits = lifecycle.settings

    @router.post("/v1/evaluate", openapi_extra=document_route("EvaluateRequest", "EvaluateResponse"))
    async def evaluate(request: Request) -> Response:
        """Return cross-entropy and calibration of any logits; nothing is stored or counted."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        classes = lifecycle.ready_predictor().model.manifest.classes
        return await offloader.run_if(
            len(body) > LARGE_BODY,
            lambda: json_response(evaluate_logits(decode_evaluate(body, classes, limits.max_instances))),
        )

    return router


def evaluate_logits(inputs: EvaluateInputs) -> dict[str, Any]:
    """Return losses and calibration of logits.

    Raises:
        InvalidInput: class weights that do not fit.
    """
    logits, distributions, labels, temperature, weights = inputs
    try:
        losses = numerics.cross_entropy(logits, labels, temperature, weights, "none")
        mean = numerics.cross_entropy(logits, labels, temperature, weights)
    except ValueError as error:
        raise invalid_input(("class_weights",), str(error)) from None
    return {
        "count": len(logits),
        "temperature": temperature,
        "probabilities": numerics.softmax(logits, temperature),
        "losses": losses,
        "cross_entropy": float(mean),
        "accuracy": float(numerics.correct(logits, distributions).mean()),
        "brier": float(numerics.brier(logits, distributions, temperature).mean()),
        "ece": numerics.ece(logits, distributions, temperature),
        "warnings": _warnings(logits),
    }


def _warnings(logits: Floats) -> list[dict[str, Any]]:
    """Return the rows of logits that look like probabilities."""
    suspicious = (logits >= 0).all(axis=1) & (abs(logits.sum(axis=1) - 1) <= PROBABILITY_TOLERANCE)
    rows = np.flatnonzero(suspicious).tolist() if logits.shape[1] > 1 else []
    text = "looks like probabilities, not logits; softmax was applied. To evaluate probabilities, send their logarithms"
    return [{"rows": rows, "msg": text}] if rows else []
