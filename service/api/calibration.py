"""The routes of calibration: watch it, fit a temperature, put one in force. Bytes in, one use case, bytes out."""

from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.auth import fingerprint
from service.api.flights import looked_up
from service.api.predict import documented, json_response
from service.calibration import use_cases
from service.codecs import requests
from service.codecs.store_requests import moment
from service.errors import Fault, InvalidInput
from service.lifecycle import Lifecycle
from service.server.body import JSON, media_type, read_body


def build_router(lifecycle: Lifecycle) -> APIRouter:
    """All routes of calibration."""
    router = APIRouter(tags=["calibration"])
    limits = lifecycle.settings

    @router.get("/v1/calibration", openapi_extra=looked_up(None, requests.CalibrationQuery))
    async def watch(request: Request) -> Response:
        """How far the probabilities can be believed, from the truths that have joined, and drift without any."""
        asked = requests.parse_query(request.query_params.multi_items(), requests.CalibrationQuery)
        memory, predictor = lifecycle.memory(), lifecycle.ready_predictor()
        body = await use_cases.watch(memory, predictor, asked.window, asked.periods)
        for period in body.get("over_time", ()):
            period["from"], period["to"] = moment(period["from"]), moment(period["to"])
        return json_response(body)

    @router.post("/v1/calibration/fits", openapi_extra=documented("FitRequest", None, "409", "501"))
    async def fits(request: Request) -> Response:
        """Fit a temperature to the truths that have joined, scored on engines left out; it is kept and not applied."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        memory, asked = lifecycle.memory(), requests.parse(body or b"{}", requests.FitRequest)
        return json_response(await use_cases.fit(memory, lifecycle.ready_predictor(), asked.window))

    @router.get("/v1/calibration/temperature", openapi_extra=looked_up(None, requests.NoQuery))
    async def changes(request: Request) -> Response:
        """The temperature in force and every change of it: when, by which key, from which fit."""
        requests.parse_query(request.query_params.multi_items(), requests.NoQuery)
        memory, predictor = lifecycle.memory(), lifecycle.ready_predictor()
        found = await memory.temperature_changes(predictor.model.digest)
        rows = [
            {
                "changed_at": moment(row.changed),
                "temperature": row.temperature,
                "temperature_source": row.source,
                "fit_id": row.fit,
                "rollback": row.undoes is not None,
                "who": row.who,
            }
            for row in found
        ]
        return json_response(in_force(lifecycle) | {"changes": rows})

    asked_of = documented("TemperatureRequest", None, "404", "409", "501")

    @router.put("/v1/calibration/temperature", openapi_extra=asked_of)
    async def change(request: Request) -> Response:
        """Put the temperature of a fit in force, or another one, or take the last change back (admin)."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        memory, asked = lifecycle.memory(), requests.parse(body, requests.TemperatureRequest)
        if (asked.fit_id is not None) + (asked.temperature is not None) + asked.rollback != 1:
            message = "say one of fit_id, temperature and rollback"
            raise InvalidInput(message, (Fault((), message),))
        who = fingerprint(dict(request.scope["headers"]))
        await use_cases.temper(memory, lifecycle.ready_predictor(), asked.fit_id, asked.temperature, who)
        await lifecycle.temper()
        return json_response(in_force(lifecycle))

    return router


def in_force(lifecycle: Lifecycle) -> dict[str, Any]:
    """The temperature that answers now."""
    predictor = lifecycle.ready_predictor()
    return {
        "model": predictor.model.digest,
        "temperature": predictor.temperature,
        "temperature_source": predictor.temperature_source,
    }
