"""The routes of calibration: watch it, fit a temperature, change the active temperature."""

from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.auth import fingerprint
from service.api.openapi import document_query, document_route
from service.api.requests import CalibrationQuery, FitRequest, NoQuery, TemperatureRequest
from service.calibration import use_cases
from service.codecs.parse import parse, parse_query
from service.codecs.store_json import format_time
from service.errors import Fault, InvalidInput
from service.lifecycle import Lifecycle
from service.server.body import read_body
from service.server.media_types import JSON, media_type
from service.server.responses import json_response


def build_router(lifecycle: Lifecycle) -> APIRouter:
    """Return the router of calibration."""
    router = APIRouter(tags=["calibration"])
    limits = lifecycle.settings

    @router.get("/v1/calibration", openapi_extra=document_query(None, CalibrationQuery))
    async def watch(request: Request) -> Response:
        """Compare stored predictions with their labels, and readings with the reference, which needs no labels."""
        parameters = parse_query(request.query_params.multi_items(), CalibrationQuery)
        store, predictor = lifecycle.require_store(), lifecycle.ready_predictor()
        body = await use_cases.report(store, predictor, parameters.window, parameters.periods)
        for period in body.get("over_time", ()):
            period["from"], period["to"] = format_time(period["from"]), format_time(period["to"])
        return json_response(body)

    @router.post("/v1/calibration/fits", openapi_extra=document_route("FitRequest", None, "409", "501"))
    async def fits(request: Request) -> Response:
        """Fit a temperature to the joined labels, scored on held-out engines; it is stored, not applied."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        store, submitted = lifecycle.require_store(), parse(body or b"{}", FitRequest)
        return json_response(await use_cases.fit(store, lifecycle.ready_predictor(), submitted.window))

    @router.get("/v1/calibration/temperature", openapi_extra=document_query(None, NoQuery))
    async def changes(request: Request) -> Response:
        """Return the active temperature and every change of it: when, by which key, from which fit."""
        parse_query(request.query_params.multi_items(), NoQuery)
        store, predictor = lifecycle.require_store(), lifecycle.ready_predictor()
        rows = [
            {
                "changed_at": format_time(change.changed),
                "temperature": change.temperature,
                "temperature_source": change.source,
                "fit_id": change.fit,
                "rollback": change.reverts is not None,
                "who": change.actor,
            }
            for change in await store.temperature_changes(predictor.model.digest)
        ]
        return json_response(active_temperature(lifecycle) | {"changes": rows})

    extra = document_route("TemperatureRequest", None, "404", "409", "501")

    @router.put("/v1/calibration/temperature", openapi_extra=extra)
    async def change(request: Request) -> Response:
        """Activate the temperature of a fit or a given one, or undo the last change (admin)."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        store, submitted = lifecycle.require_store(), parse(body, TemperatureRequest)
        if (submitted.fit_id is not None) + (submitted.temperature is not None) + submitted.rollback != 1:
            message = "expected exactly one of fit_id, temperature and rollback"
            raise InvalidInput(message, (Fault((), message),))
        actor = fingerprint(dict(request.scope["headers"]))
        await use_cases.apply_temperature(
            store, lifecycle.ready_predictor(), submitted.fit_id, submitted.temperature, actor
        )
        await lifecycle.refresh_temperature()
        return json_response(active_temperature(lifecycle))

    return router


def active_temperature(lifecycle: Lifecycle) -> dict[str, Any]:
    """Return the model that serves, its temperature and where that comes from."""
    predictor = lifecycle.ready_predictor()
    return {
        "model": predictor.model.digest,
        "temperature": predictor.temperature,
        "temperature_source": predictor.temperature_source,
    }
