"""Responses in one buffer."""

from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class BytesResponse(Response):
    """A complete body with the headers that it needs. Constructed without Starlette's search for other headers."""

    def __init__(self, body: bytes, status: int, media_type: str) -> None:
        self.body, self.status_code, self.background = body, status, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", media_type.encode())]

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send two ASGI messages."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})


def json_response(value: Any, status: int = 200, media_type: str = "application/json") -> BytesResponse:
    """Return a JSON response; numpy numbers are written in their shortest form."""
    return BytesResponse(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type)
