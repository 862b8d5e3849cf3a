"""The body of a request: never more of it than the limits, never later than the limit, inflated if it came deflated."""

import asyncio
import zlib
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import Message, Receive

from service.errors import BodyTooLarge, ClientGone, NotJson, TooSlow, UnsupportedMediaType

JSON = "application/json"
INFLATE_STEP = 1 << 20  # bytes inflated at a time


def media_type(request: Request, accepted: tuple[str, ...]) -> str:
    """The content type, one of those accepted; nothing said means the first.

    Raises:
        UnsupportedMediaType: another one.
    """
    kind = request.headers.get("content-type", accepted[0]).partition(";")[0].strip().lower()
    if kind.endswith("+json"):
        kind = JSON
    if kind not in accepted:
        raise UnsupportedMediaType(f"content type {kind[:80]!r}: this call reads {' or '.join(accepted)}")
    return kind


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body, inflated.

    Args:
        request: of which the headers are there, and perhaps no more.
        limit: bytes, before and after inflating.
        seconds: in which the whole body must have arrived.

    Raises:
        BodyTooLarge: more bytes than the limit, announced, sent or inflated.
        TooSlow: not whole in time.
        ClientGone: the client left before its body was whole.
        UnsupportedMediaType: an encoding other than gzip.
        NotJson: the bytes are not what the encoding says.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise UnsupportedMediaType(f"content encoding {encoding[:80]!r}: this call reads plain or gzip bodies")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise BodyTooLarge(f"{announced} bytes, at most {limit} are read")
    message = await request.receive()
    if message["type"] == "http.request" and not message.get("more_body"):  # it came with its headers: no timer is set
        body: bytes = message.get("body", b"")
    else:
        try:
            async with asyncio.timeout(seconds):
                body = await _rest(message, request.receive, limit)
        except TimeoutError:
            raise TooSlow(f"the body did not arrive in {seconds:g} s") from None
    if len(body) > limit:
        raise BodyTooLarge(f"{len(body)} bytes, at most {limit} are read")
    return body if encoding == "identity" else await asyncio.to_thread(inflate, body, limit)


async def _rest(part: Message, receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        if part["type"] == "http.disconnect":
            raise ClientGone("the client left before its body was whole")
        piece = part.get("body", b"")
        if piece:
            parts.append(piece)
            size += len(piece)
        if size > limit:
            raise BodyTooLarge(f"more than {limit} bytes")
        if not part.get("more_body"):
            return b"".join(parts)
        if len(parts) > 4096:  # a million tiny pieces are not a million objects
            parts = [b"".join(parts)]
        part = await receive()


def inflate(body: bytes, limit: int) -> bytes:
    """A gzip body as it was, a step at a time, so that a bomb is dropped when it passes the limit.

    Raises:
        BodyTooLarge: more than `limit` bytes inflated.
        NotJson: no gzip, or cut short.
    """
    found = bytearray()
    rest = body
    try:
        while rest:  # a gzip file may have several members
            stream = zlib.decompressobj(wbits=31)
            while not stream.eof:
                step = stream.decompress(rest, INFLATE_STEP)
                rest = stream.unconsumed_tail
                found += step
                if len(found) > limit:
                    raise BodyTooLarge(f"more than {limit} bytes when inflated")
                if not (step or rest or stream.eof):
                    raise NotJson("the gzip body is cut short")
            rest = stream.unused_data
    except zlib.error as error:
        raise NotJson(f"the body is not gzip: {error}") from None
    return bytes(found)


def leaving(receive: Receive) -> Callable[[], bool]:
    """Whether the client has left, asked without waiting: `receive` is stepped once and put away.

    Servers give the news of a client that left to whoever waits in `receive`; a task waiting there for each request
    would cost more than the answer.
    """

    def gone() -> bool:
        waiting = receive()
        try:
            waiting.send(None)  # type: ignore[attr-defined]  # every ASGI server's receive is a coroutine
        except StopIteration as said:
            return bool(said.value["type"] == "http.disconnect")
        waiting.close()  # type: ignore[attr-defined]  # as above
        return False

    return gone
