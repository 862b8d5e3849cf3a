"""Which paths there are, whatever is asked of them: their templates, and the methods of each."""

from collections.abc import Iterable

from starlette.routing import BaseRoute, Route


class Paths:
    """The paths of all routes."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]

    def template(self, path: str) -> str | None:
        """The template that a path has, None if it has none."""
        return next((route.path for route in self._of(path)), None)

    def allowed(self, path: str) -> str:
        """The methods of a path, as the header `Allow` has them. HEAD goes wherever GET does."""
        methods = {method for route in self._of(path) for method in route.methods or ()}
        return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))

    def _of(self, path: str) -> Iterable[Route]:
        return (route for route in self._routes if route.path_regex.fullmatch(path))
