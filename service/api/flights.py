"""The routes of what is remembered: flights, labels, ends, engines. Bytes in, one call of the memory, bytes out."""

from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import Struct

from service.api.predict import LARGE_ANSWER, LARGE_BODY, Aside, Endpoint, documented, json_response
from service.api.route_index import FastRoute
from service.codecs import requests, store_requests
from service.errors import Conflict, Fault, InvalidInput, Unknown
from service.lifecycle import Lifecycle
from service.server.body import JSON, leaving, media_type, read_body
from service.server.direct import Written
from service.store.sql import queries

MOST_FLIGHTS = 500  # of one engine, for its sensors


def build_cycles(lifecycle: Lifecycle, aside: Aside) -> Endpoint:
    """The call of a data collector."""
    limits = lifecycle.settings

    async def cycles(request: Request) -> Response:
        """Keep flights, one row each, and answer each engine's health from all that is known up to that cycle."""
        media_type(request, (JSON,))
        lifecycle.ready_predictor().admit(0)
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        memory, predictor = lifecycle.memory(), lifecycle.ready_predictor()
        model, large = predictor.model, len(body) > LARGE_BODY
        flights = await aside.run(large, lambda: store_requests.read_flights(body, model, limits.max_instances))
        recorded = await memory.record_flights(predictor, flights, leaving(request))
        many = len(flights) * len(model.manifest.classes) > LARGE_ANSWER
        return await aside.run(
            many, lambda: Written(store_requests.cycles_json(predictor, flights, recorded), 200, JSON)
        )

    return cycles


def build_router(lifecycle: Lifecycle, aside: Aside, cycles: Endpoint) -> APIRouter:
    """All routes of what is remembered but calibration."""
    router = APIRouter(tags=["memory"])
    limits = lifecycle.settings

    def told(request: str, response: str | None, *codes: str) -> dict[str, Any]:
        return documented(request, response, "409", "501", *codes)

    asked = told("CyclesRequest", "CyclesResponse")
    router.add_api_route("/v1/cycles", cycles, methods=["POST"], openapi_extra=asked, route_class_override=FastRoute)

    @router.post("/v1/labels", openapi_extra=told("LabelsRequest", "LabelsResponse"))
    async def labels(request: Request) -> Response:
        """Truths that arrive late, by prediction or by engine and cycle, before or after the prediction."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        memory, classes = lifecycle.memory(), lifecycle.ready_predictor().model.manifest.classes
        rows = await aside.run(
            len(body) > LARGE_BODY, lambda: store_requests.read_labels(body, classes, limits.max_instances)
        )
        answered = await memory.label(rows)
        return json_response(store_requests.labels_json(rows, answered.results, classes))

    @router.post("/v1/outcomes", openapi_extra=told("OutcomeRequest", "OutcomeResponse"))
    async def outcomes(request: Request) -> Response:
        """The end of an engine, which labels its whole remembered history and what arrives for it later."""
        media_type(request, (JSON,))
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        memory, asked = lifecycle.memory(), requests.parse(body, requests.OutcomeRequest)
        ended = await memory.end(asked.engine_id, asked.failed_at_cycle, asked.revise)
        if ended.result == "conflict":
            both = [{"result": "conflict", "given": asked.failed_at_cycle, "known": ended.known}]
            message = f"engine {asked.engine_id!r} is known to have failed at cycle {ended.known}, not "
            raise Conflict(f'{message}{asked.failed_at_cycle}; "revise": true would replace it', results=both)
        return json_response(
            {
                "engine_id": asked.engine_id,
                "failed_at_cycle": asked.failed_at_cycle,
                "result": ended.result,
                "labelled": ended.labelled,
            }
        )

    @router.get("/v1/engines", openapi_extra=looked_up("EnginesResponse", requests.EnginesQuery))
    async def engines(request: Request) -> Response:
        """The latest health of every remembered engine, worst first, a hundred a page."""
        asked = requests.parse_query(request.query_params.multi_items(), requests.EnginesQuery)
        memory, classes = lifecycle.memory(), lifecycle.ready_predictor().model.manifest.classes
        if asked.health is not None and asked.health not in classes:
            message = f"unknown class {asked.health[:50]!r}; classes are {', '.join(classes[:20])}"
            raise InvalidInput(f"health: {message}", (Fault(("health",), message),))
        wanted = queries.Wanted(
            None if asked.health is None else classes.index(asked.health),
            None if asked.next is None else store_requests.read_cursor(asked.next),
            asked.limit,
            None if asked.since is None else store_requests.read_moment("since", asked.since),
            asked.running,
            asked.trend,
        )
        page = await memory.engines(wanted)
        return await aside.run(True, lambda: json_response(store_requests.engines_json(page)))

    @router.get("/v1/engines/{engine_id:path}", openapi_extra=looked_up("HistoryResponse", requests.HistoryQuery))
    async def history(engine_id: str, request: Request) -> Response:
        """Everything that was predicted of an engine, oldest first; with `superseded=true` also what counts no more."""
        asked = requests.parse_query(request.query_params.multi_items(), requests.HistoryQuery)
        memory = lifecycle.memory()
        found = await memory.history(engine_id, asked.superseded)
        if found is None:
            raise Unknown(f"nothing is remembered of an engine {engine_id[:200]!r}")
        body = await aside.run(True, lambda: store_requests.history_json(engine_id, found))
        if asked.sensors:
            manifest = lifecycle.ready_predictor().model.manifest
            flown = await memory.sensors(engine_id, manifest.channel_names, MOST_FLIGHTS)
            body["sensors"] = await aside.run(True, lambda: store_requests.sensors_json(manifest, *flown))
        return await aside.run(True, lambda: json_response(body))

    return router


def looked_up(response: str | None, query: type[Struct]) -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads the memory."""
    found = documented(None, response, "404", "422", "501")
    return found | {"parameters": requests.query_parameters(query, "")}
