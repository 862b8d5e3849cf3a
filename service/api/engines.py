"""The routes of stored engines: the latest health of all, and the history of one."""

from fastapi import APIRouter, Request, Response

from service.api.offload import Offloader
from service.api.openapi import document_query
from service.api.requests import EnginesQuery, HistoryQuery
from service.codecs.faults import invalid_input, unknown_class
from service.codecs.parse import parse_query
from service.codecs.store_json import engines_json, history_json, sensors_json
from service.codecs.store_requests import decode_cursor, parse_time
from service.errors import NotFound
from service.lifecycle import Lifecycle
from service.server.responses import json_response
from service.store.records import EngineQuery

MAX_SENSOR_FLIGHTS = 500  # of one engine, for its sensors


def build_router(lifecycle: Lifecycle, offloader: Offloader) -> APIRouter:
    """Return the router of stored engines."""
    router = APIRouter(tags=["store"])

    @router.get("/v1/engines", openapi_extra=document_query("EnginesResponse", EnginesQuery))
    async def engines(request: Request) -> Response:
        """Return the latest health of every stored engine, worst first, 100 per page."""
        parameters = parse_query(request.query_params.multi_items(), EnginesQuery)
        store, classes = lifecycle.require_store(), lifecycle.ready_predictor().model.manifest.classes
        page = await store.engines(_page_query(parameters, classes))
        return await offloader.run(lambda: json_response(engines_json(page)))

    @router.get("/v1/engines/{engine_id:path}", openapi_extra=document_query("HistoryResponse", HistoryQuery))
    async def history(engine_id: str, request: Request) -> Response:
        """Return all predictions of an engine, oldest first; with `superseded=true` also replaced ones."""
        parameters = parse_query(request.query_params.multi_items(), HistoryQuery)
        store = lifecycle.require_store()
        predictions = await store.history(engine_id, parameters.superseded)
        if predictions is None:
            raise NotFound(f"no flight or prediction is stored for engine {engine_id[:200]!r}")
        body = await offloader.run(lambda: history_json(engine_id, predictions))
        if parameters.sensors:
            manifest = lifecycle.ready_predictor().model.manifest
            cycles, readings = await store.sensors(engine_id, manifest.channel_names, MAX_SENSOR_FLIGHTS)
            body["sensors"] = await offloader.run(lambda: sensors_json(manifest, cycles, readings))
        return await offloader.run(lambda: json_response(body))

    return router


def _page_query(parameters: EnginesQuery, classes: tuple[str, ...]) -> EngineQuery:
    """Return the query of one page.

    Raises:
        InvalidInput: an unknown class, a malformed cursor or time.
    """
    health = parameters.health
    if health is not None and health not in classes:
        raise invalid_input(("health",), unknown_class(health, classes))
    return EngineQuery(
        None if health is None else classes.index(health),
        None if parameters.next is None else decode_cursor(parameters.next),
        parameters.limit,
        None if parameters.since is None else parse_time("since", parameters.since),
        parameters.running,
        parameters.trend,
    )
