"""The route of /v1/cycles: store flights and predict the health of their engines."""

from fastapi import APIRouter, Request, Response

from service.api.offload import LARGE_BODY, LARGE_RESPONSE, Offloader
from service.api.openapi import document_route
from service.api.route_index import Endpoint, FastRoute
from service.codecs import store_json, store_requests
from service.lifecycle import Lifecycle
from service.server.body import read_body
from service.server.media_types import JSON, JSON_HEADER, media_type
from service.server.responses import BytesResponse
from service.server.scope import context_of


def build_endpoint(lifecycle: Lifecycle, offloader: Offloader) -> Endpoint:
    """Return the endpoint of /v1/cycles, which data collectors call."""
    limits = lifecycle.settings

    async def cycles(request: Request) -> Response:
        """Store flights, one row each, and predict the health of each engine from its flights up to that cycle."""
        context = context_of(request.scope)
        if context.headers.get(b"content-type") != JSON_HEADER:
            media_type(request, (JSON,))
        predictor = lifecycle.predictor or lifecycle.ready_predictor()
        predictor.admit(0)
        body = await read_body(request, limits.max_body_bytes, limits.request_seconds)
        store = lifecycle.store or lifecycle.require_store()
        predictor = lifecycle.predictor or lifecycle.ready_predictor()
        model, max_flights = predictor.model, limits.max_instances
        if len(body) > LARGE_BODY:
            flights = await offloader.run(lambda: store_requests.decode_flights(body, model, max_flights))
        else:
            flights = store_requests.decode_flights(body, model, max_flights)
        recorded = await store.record_flights(predictor, flights)
        if len(flights) * len(model.manifest.classes) > LARGE_RESPONSE:
            document = await offloader.run(lambda: store_json.cycles_json(predictor, flights, recorded))
        else:
            document = store_json.cycles_json(predictor, flights, recorded)
        return BytesResponse(document, 200, JSON)

    return cycles


def build_router(cycles: Endpoint) -> APIRouter:
    """Return the router of /v1/cycles."""
    router = APIRouter(tags=["store"])
    extra = document_route("CyclesRequest", "CyclesResponse", "409", "501")
    router.add_api_route("/v1/cycles", cycles, methods=["POST"], openapi_extra=extra, route_class_override=FastRoute)
    return router
