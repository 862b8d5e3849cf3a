from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.route_index import FastRoute, RouteIndex
from service.app import create_app
from service.settings import read_settings


async def endpoint(_: Request) -> Response:
    return Response()


def scope_of(method: str, path: str) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path}


def test_fast_route_is_found_by_method_and_path_as_a_router_does() -> None:
    """Only the routes that are registered as fast are found; their parameters and templates are in the scope."""
    router = APIRouter()
    router.add_api_route("/a", endpoint, methods=["POST"], route_class_override=FastRoute)
    router.add_api_route("/b/{name}/run", endpoint, methods=["POST"], route_class_override=FastRoute)
    router.add_api_route("/c", endpoint, methods=["POST"])
    index, scope = RouteIndex(router.routes), scope_of("POST", "/b/x y/run")
    found = index.fast_route(scope)
    assert found is not None
    assert ("/b/{name}/run", {"name": "x y"}) == (scope["route"].path, scope["path_params"])
    assert endpoint is found.endpoint
    plain = index.fast_route(scope_of("POST", "/a"))
    assert plain is not None
    assert "/a" == plain.path
    for method, path in (("GET", "/a"), ("POST", "/a/"), ("POST", "/c"), ("POST", "/b/x/y/run"), ("GET", "/b/x/run")):
        scope = scope_of(method, path)
        assert index.fast_route(scope) is None
        assert scope_of(method, path) == scope


def test_fast_routes_of_the_application_are_its_busiest_calls() -> None:
    """The calls of clients that send again and again are registered as fast routes, with their templates in OpenAPI."""
    application = create_app(read_settings(), print)
    index = application.served._index  # type: ignore[attr-defined]  # the middleware, as no tracing is set up
    expected = {
        "/v1/predict": "/v1/predict",
        "/v1/cycles": "/v1/cycles",
        "/v2/models/m/infer": "/v2/models/{name}/infer",
        "/v2/models/m/versions/1/infer": "/v2/models/{name}/versions/{version}/infer",
    }
    found = {path: getattr(index.fast_route(scope_of("POST", path)), "path", None) for path in expected}
    assert expected == found
    assert set(expected.values()) <= set(application.api.openapi()["paths"])
