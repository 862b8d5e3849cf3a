"""The index of all routes: templates and methods by path, and the fast routes, which the middleware calls directly."""

from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Route
from starlette.types import Scope


class FastRoute(APIRoute):
    """A route whose endpoint takes the request and returns the response, and is called without the router.

    Register it with `router.add_api_route(..., route_class_override=FastRoute)`.
    """


class Paths:
    """The paths of all routes."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]
        fast = [route for route in self._routes if isinstance(route, FastRoute)]
        called = [(method, route) for route in fast for method in route.methods or ()]
        self._fixed = {(method, route.path): route for method, route in called if not route.param_convertors}
        self._templates = [(method, route) for method, route in called if route.param_convertors]

    def fast_route(self, scope: Scope) -> FastRoute | None:
        """Return the fast route of a request, and add the route and its parameters to the scope as a router does."""
        method, path = scope["method"], scope["path"]
        route = self._fixed.get((method, path))
        if route is None:
            for verb, template in self._templates:
                if verb == method and (match := template.path_regex.fullmatch(path)):
                    scope["path_params"], route = match.groupdict(), template
                    break
            else:
                return None
        scope["route"] = route
        return route

    def template(self, path: str) -> str | None:
        """The template that a path has, None if it has none."""
        return next((route.path for route in self._of(path)), None)

    def allowed(self, path: str) -> str:
        """The methods of a path, as the header `Allow` has them. HEAD goes wherever GET does."""
        methods = {method for route in self._of(path) for method in route.methods or ()}
        return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))

    def _of(self, path: str) -> Iterable[Route]:
        return (route for route in self._routes if route.path_regex.fullmatch(path))
