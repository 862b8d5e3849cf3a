"""The OpenAPI document: bodies, query parameters and problems of each route."""

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from msgspec import Struct

from service.api.requests import FitRequest, OutcomeRequest, TemperatureRequest
from service.api.responses import (
    CyclesResponse,
    EnginesResponse,
    EvaluateResponse,
    HistoryResponse,
    InferError,
    LabelsResponse,
    OutcomeResponse,
    PredictResponse,
    Problem,
)
from service.codecs.requests import CyclesRequest, EvaluateRequest, InferRequest, LabelsRequest, PredictRequest
from service.server.media_types import JSON

ARROW_TABLE = {
    "type": "string",
    "format": "binary",
    "description": "An Arrow stream of flights: one column of numbers per channel, by name, and optionally "
    "`engine_id` (strings), `cycle` (integers) and `label` (class names or indices). The rows of one engine, by cycle, "
    "are one instance, labelled as its newest row is; without `engine_id` the whole table is one.",
}
BODIES = (
    *(PredictRequest, PredictResponse, EvaluateRequest, EvaluateResponse, InferRequest, InferError, Problem),
    *(CyclesRequest, CyclesResponse, LabelsRequest, LabelsResponse, OutcomeRequest, OutcomeResponse),
    *(EnginesResponse, HistoryResponse, FitRequest, TemperatureRequest),
)


def document_route(
    request: str | None,
    response: str | None,
    *codes: str,
    problem: tuple[str, str] = ("Problem", "application/problem+json"),
) -> dict[str, Any]:
    """Return the OpenAPI description of a route.

    Args:
        request: schema name of the request body; None without a body.
        response: schema name of the response body; None to leave it open.
        codes: status codes of problems, in addition to those that every route has.
        problem: schema name and media type of problems.
    """

    def content(name: str, media_type: str = JSON) -> dict[str, Any]:
        return {"content": {media_type: {"schema": {"$ref": f"#/components/schemas/{name}"}}}}

    refusal = {"description": "Problem", **content(*problem)}
    extra: dict[str, Any] = {
        "responses": {"200": {"description": "Response", **(content(response) if response else {})}}
    }
    always = ("400", "401", "403", "408", "413", "415", "422", "429", "503") if request else ("401", "403", "503")
    extra["responses"] |= dict.fromkeys((*always, *codes), refusal)
    return extra | ({"requestBody": {"required": True, **content(request)}} if request else {})


def document_query(response: str | None, query: type[Struct]) -> dict[str, Any]:
    """Return the OpenAPI description of a route that reads the store with query parameters."""
    return document_route(None, response, "404", "422", "501") | {"parameters": query_parameters(query, "")}


def query_parameters(query: type[Struct], note: str) -> list[dict[str, Any]]:
    """Return the fields of a type as query parameters; `note` ends each description."""
    properties = msgspec.json.schema_components((query,))[1][query.__name__]["properties"]
    return [
        {"name": name, "in": "query", "description": f"{field.get('description', '')} {note}", "schema": field}
        for name, field in properties.items()
    ]


def openapi_schema(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of an application: its routes and the JSON schemas of all bodies."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        bodies = msgspec.json.schema_components(BODIES, ref_template="#/components/schemas/{name}")[1]
        schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies)
        app.openapi_schema = schema
    return app.openapi_schema
