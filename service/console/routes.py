"""The console's files, and the Plotly that the installed package carries. Knows files and headers, nothing of engines.

Files are told by name from a list made at start, so that no path leads out of their folder. A file is asked for again
each time and answered with 304 while it is the same; only Plotly, which is large, is kept by browsers for a day.
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
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GUARDS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Content-Security-Policy": POLICY}
WORTH_PACKING = 1024  # bytes; smaller ones gain nothing
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


@dataclass
class Page:
    """A file that is served; its packed form is made when first asked for, and kept."""

    path: Path
    kept: str = "no-cache"  # as Cache-Control has it
    packed: bytes | None = field(default=None, repr=False)
    tag: str = ""

    def answer(self, request: Request) -> Response:
        """The file, packed for who takes that; 304 for who has it."""
        self._pack()
        headers = GUARDS | {"Cache-Control": self.kept, "ETag": self.tag, "Vary": "Accept-Encoding"}
        known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if self.tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        kind = TYPES.get(self.path.suffix) or mimetypes.guess_type(self.path.name)[0] or "application/octet-stream"
        kind += "; charset=utf-8" if kind.startswith("text/") else ""
        if self.packed is not None and takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(self.packed, headers=headers | {"Content-Encoding": "gzip"}, media_type=kind)
        return Response(self.path.read_bytes(), headers=headers, media_type=kind)

    def _pack(self) -> None:
        if not self.tag:
            content = self.path.read_bytes()
            self.packed = gzip.compress(content, 6, mtime=0) if len(content) > WORTH_PACKING else None
            self.tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def takes_gzip(accepted: str) -> bool:
    """Whether a client that sends this `Accept-Encoding` takes gzip: a weight of 0 is a no."""
    weights = {name.strip().lower(): weight for name, _, weight in (one.partition(";") for one in accepted.split(","))}
    weight = weights.get("gzip", weights.get("*", "q=0"))
    return re.fullmatch(r"\s*q=0(\.0*)?\s*", weight) is None


def build_router() -> APIRouter:
    """The console at `/`, what it is made of below `/console/`."""
    router = APIRouter(include_in_schema=False)
    shelf = {path.name: Page(path) for path in FOLDER.iterdir() if path.is_file()}
    shelf[PLOTLY] = Page(_plotly(), "public, max-age=86400")

    async def page(request: Request, name: str = INDEX) -> Response:
        """A file of the console."""
        if name not in shelf:
            raise HTTPException(404, f"the console has no file {name[:80]!r}")
        return await asyncio.to_thread(shelf[name].answer, request)

    @router.get("/")
    async def index(request: Request) -> Response:
        """The console."""
        return await page(request)

    router.add_api_route("/console/{name}", page, methods=["GET"])
    return router


def _plotly() -> Path:
    """The file within the installed package, which is found without importing it."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the console's charts need the package plotly")
    return Path(found.origin).parent / "package_data" / PLOTLY
