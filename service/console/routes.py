"""The routes of the console: its static files, and Plotly from the installed package. Independent of the API.

Files are found by name in an index that is built at start, so no path leads out of their folder. Browsers revalidate a
file on each use and get 304 while it is unchanged. Only Plotly, which is large, is cached for a day.
"""

import asyncio
import gzip
import hashlib
import importlib.util
import mimetypes
import re
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent / "static"
INDEX, PLOTLY = "index.html", "plotly.min.js"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}
MIN_GZIP_BYTES = 1024  # smaller files gain nothing
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


@dataclass
class StaticFile:
    """A static file; it is compressed on first use, and cached."""

    path: Path
    cache_control: str = "no-cache"
    compressed: bytes | None = field(default=None, repr=False)
    tag: str = ""

    def respond(self, request: Request) -> Response:
        """Return the file, compressed if the client accepts gzip; 304 if the client has it."""
        self._compress()
        headers = SECURITY_HEADERS | {"Cache-Control": self.cache_control, "ETag": self.tag, "Vary": "Accept-Encoding"}
        tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.tag in tags or "*" in tags:
            return Response(status_code=304, headers=headers)
        kind = TYPES.get(self.path.suffix) or mimetypes.guess_type(self.path.name)[0] or "application/octet-stream"
        kind += "; charset=utf-8" if kind.startswith("text/") else ""
        if self.compressed is not None and accepts_gzip(request.headers.get("accept-encoding", "")):
            return Response(self.compressed, headers=headers | {"Content-Encoding": "gzip"}, media_type=kind)
        return Response(self.path.read_bytes(), headers=headers, media_type=kind)

    def _compress(self) -> None:
        if not self.tag:
            content = self.path.read_bytes()
            self.compressed = gzip.compress(content, 6, mtime=0) if len(content) > MIN_GZIP_BYTES else None
            self.tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def accepts_gzip(accepted: str) -> bool:
    """Return whether a client with this `Accept-Encoding` accepts gzip; a weight of 0 means no."""
    weights = {
        name.strip().lower(): weight for name, _, weight in (part.partition(";") for part in accepted.split(","))
    }
    weight = weights.get("gzip", weights.get("*", "q=0"))
    return re.fullmatch(r"\s*q=0(\.0*)?\s*", weight) is None


def build_router() -> APIRouter:
    """Return the router of the console: the page at `/`, its files below `/console/`."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: StaticFile(path) for path in FOLDER.iterdir() if path.is_file()}
    files[PLOTLY] = StaticFile(_plotly(), "public, max-age=86400")

    async def page(request: Request, name: str = INDEX) -> Response:
        """Return a file of the console."""
        if name not in files:
            raise HTTPException(404, f"the console has no file {name[:80]!r}")
        return await asyncio.to_thread(files[name].respond, request)

    @router.get("/")
    async def index(request: Request) -> Response:
        """Return the page of the console."""
        return await page(request)

    router.add_api_route("/console/{name}", page, methods=["GET"])
    return router


def _plotly() -> Path:
    """Return the file in the installed package, without importing the package."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the console's charts need the package plotly")
    return Path(spec.origin).parent / "package_data" / PLOTLY
