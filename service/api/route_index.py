"""The index of all routes: templates and methods by path, and the fast routes, which the middleware calls directly."""

from collections.abc import Awaitable, Callable, Iterable

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

Endpoint = Callable[[Request], Awaitable[Response]]


class FastRoute(APIRoute):
    """A route whose endpoint takes the request and returns the response, and is called without the router.

    Register it with `router.add_api_route(..., route_class_override=FastRoute)`.
    """


class RouteIndex:
    """The index of all routes.

    Attributes:
        fixed: the fast routes without path parameters, by method and path.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]
        fast = [route for route in self._routes if isinstance(route, FastRoute)]
        by_method = [(method, route) for route in fast for method in route.methods or ()]
        self.fixed = {(method, route.path): route for method, route in by_method if not route.param_convertors}
        self._templates = [(method, route) for method, route in by_method if route.param_convertors]

    def fast_route(self, scope: Scope) -> FastRoute | None:
        """Return the fast route of a request; add the route and its parameters to the scope as a router does."""
        method, path = scope["method"], scope["path"]
        route = self.fixed.get((method, path))
        if route is None:
            for verb, template in self._templates:
                if verb == method and (match := template.path_regex.fullmatch(path)):
                    scope["path_params"], route = match.groupdict(), template
                    break
            else:
                return None
        scope["route"] = route
        return route

    def fast_routes(self) -> Iterable[tuple[str, str]]:
        """Return method and path template of every fast route."""
        return [*self.fixed, *((method, route.path) for method, route in self._templates)]

    def template(self, path: str) -> str | None:
        """Return the path template of a path; None if no route matches."""
        return next((route.path for route in self._matching(path)), None)

    def allowed_methods(self, path: str) -> str:
        """Return the methods of a path in the form of the header `Allow`. A path with GET also has HEAD."""
        methods = {method for route in self._matching(path) for method in route.methods or ()}
        return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))

    def _matching(self, path: str) -> Iterable[Route]:
        return (route for route in self._routes if route.path_regex.fullmatch(path))
