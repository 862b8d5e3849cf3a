"""The body of a request: never more of it than the limits, never later than the limit, inflated if it came deflated."""

import asyncio
import zlib
from collections.abc import Callable
from io import BytesIO

from starlette.requests import Request
from starlette.types import Receive

from service.errors import BodyTooLarge, ClientGone, NotJson, TooSlow, UnsupportedMediaType
from service.server.body_budget import Held
from service.server.scope import RequestContext, context_of

JSON = "application/json"
INFLATE_STEP = 1 << 20  # bytes inflated at a time
FEED_STEP = 1 << 16  # packed bytes read at a time: zlib copies what it leaves of them
MOST_MEMBERS = 4096  # of one gzip body; bgzip makes 512 of 32 MiB
LARGE = 1 << 20  # bytes; a longer body is gathered in its place, if the server can


def announced(request: Request) -> int:
    """The length of the body as its header says it, 0 if it does not."""
    return _content_length(context_of(request.scope))


def media_type(request: Request, accepted: tuple[str, ...]) -> str:
    """The content type, one of those accepted; nothing said means the first.

    Raises:
        UnsupportedMediaType: another one.
    """
    said: bytes | None = context_of(request.scope).headers.get(b"content-type")
    if said is None or said == b"application/json":  # as nearly everybody says it
        kind = JSON if said else accepted[0]
    else:
        kind = said.decode("latin-1").partition(";")[0].strip().lower()
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
        Overloaded: other bodies hold the memory that all may have together.
        TooSlow: not whole in time.
        ClientGone: the client left before its body was whole.
        UnsupportedMediaType: an encoding other than gzip.
        NotJson: the bytes are not what the encoding says.
    """
    context = context_of(request.scope)
    encoding, _ = _announced(context, limit)
    return await _received(request, context, limit, seconds, encoding)


async def read_large(request: Request, limit: int, seconds: float) -> bytes | memoryview:
    """Return the body as `read_body` does; a large one as a view that is valid until the request is answered."""
    context = context_of(request.scope)
    encoding, length = _announced(context, limit)
    exchange, held = context.exchange, context.reservation
    if exchange is None or length <= LARGE or encoding != b"identity":
        return await _received(request, context, limit, seconds, encoding)
    view = held.place(length)
    try:
        async with asyncio.timeout(seconds):
            intake = exchange.gather(view, held.take)
            try:
                refusal = await intake.whole
            finally:
                intake.drop()
    except TimeoutError:
        raise TooSlow(f"the body did not arrive in {seconds:g} s") from None
    if refusal is not None:
        raise refusal
    return view


def _content_length(context: RequestContext) -> int:
    value = context.headers.get(b"content-length", b"").strip()
    return int(value) if value.isdigit() else 0


def _announced(context: RequestContext, limit: int) -> tuple[bytes, int]:
    """Return the encoding and the length of a body according to its headers; raise if it may not come."""
    encoding = context.headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b"gzip"):
        said = encoding[:80].decode("latin-1")
        raise UnsupportedMediaType(f"content encoding {said!r}: this call reads plain or gzip bodies")
    length = _content_length(context)
    if length > limit:
        raise BodyTooLarge(f"{length} bytes, at most {limit} are read")
    context.reservation.check(length)
    return encoding, length


async def _received(request: Request, context: RequestContext, limit: int, seconds: float, encoding: bytes) -> bytes:
    exchange, held = context.exchange, context.reservation
    body = exchange.whole() if exchange else None
    if body is not None:  # it came with its headers: no timer is set
        if len(body) > limit:
            raise BodyTooLarge(f"more than {limit} bytes")
        held.take(len(body))
    else:
        try:
            async with asyncio.timeout(seconds):
                body = await _rest(request.receive, limit, held)
        except TimeoutError:
            raise TooSlow(f"the body did not arrive in {seconds:g} s") from None
    return body if encoding == b"identity" else await asyncio.to_thread(inflate, body, limit, held)


async def _rest(receive: Receive, limit: int, held: Held) -> bytes:
    found, size = BytesIO(), 0  # it grows, and gives its bytes away: pieces would leave holes between other requests'
    while True:
        part = await receive()
        if part["type"] == "http.disconnect":
            raise ClientGone("the client left before its body was whole")
        piece: bytes = part.get("body", b"")
        size += len(piece)
        if size > limit:
            raise BodyTooLarge(f"more than {limit} bytes")
        held.take(len(piece))
        last = not part.get("more_body")
        if last and size == len(piece):  # it came at once, and is not copied
            return piece
        found.write(piece)
        if last:
            return found.getvalue()


def inflate(body: bytes, limit: int, held: Held) -> bytes:
    """A gzip body as it was, a step at a time, so that a bomb is dropped when it passes the limit.

    Raises:
        BodyTooLarge: more than `limit` bytes inflated, or more members than anybody needs.
        Overloaded: other bodies hold the memory that all may have together.
        NotJson: no gzip, or cut short.
    """
    found, packed = bytearray(), memoryview(body)
    at = members = 0
    try:
        while at < len(packed):  # a gzip file may have several members
            members += 1
            if members > MOST_MEMBERS:
                raise BodyTooLarge(f"more than {MOST_MEMBERS} gzip members")
            at = _member(packed, at, found, limit, held)
    except zlib.error as error:
        raise NotJson(f"the body is not gzip: {error}") from None
    return bytes(found)


def _member(packed: memoryview, at: int, found: bytearray, limit: int, held: Held) -> int:
    """Inflate one member, and say where the next begins."""
    stream, rest = zlib.decompressobj(wbits=31), b""
    while not stream.eof:
        piece = rest or packed[at : at + FEED_STEP]
        at += 0 if rest else len(piece)
        step = stream.decompress(piece, INFLATE_STEP)
        rest = stream.unconsumed_tail
        found += step
        if len(found) > limit:
            raise BodyTooLarge(f"more than {limit} bytes when inflated")
        held.take(len(step))
        if not (step or piece or stream.eof):
            raise NotJson("the gzip body is cut short")
    return at - len(stream.unused_data)


def leaving(request: Request) -> Callable[[], bool]:
    """Return a check whether the client has left; any thread may call it."""
    context = context_of(request.scope)
    return lambda: context.disconnected
