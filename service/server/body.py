"""Read request bodies: bounded in size and time, decompressed if they are gzip."""

import asyncio
import zlib
from collections.abc import Awaitable
from io import BytesIO

from starlette.requests import Request
from starlette.types import Message, Receive

from service.errors import BodyTooLarge, ClientDisconnected, MalformedJson, RequestTimeout, UnsupportedMediaType
from service.server.body_budget import BodyReservation
from service.server.scope import RequestContext, context_of

INFLATE_STEP = 1 << 20  # bytes decompressed per step
FEED_STEP = 1 << 16  # compressed bytes read per step: zlib copies those that it leaves
MAX_GZIP_MEMBERS = 4096  # of one body; bgzip makes 512 of 32 MiB
LARGE_UPLOAD = 1 << 20  # bytes; a longer body is received directly into its buffer, if the server supports it


def read_body(request: Request, limit: int, seconds: float) -> Awaitable[bytes]:
    """Return the whole body, decompressed.

    Args:
        request: the request; its headers have arrived, its body may not have.
        limit: bytes, before and after decompression.
        seconds: time in which the whole body must arrive.

    Raises:
        BodyTooLarge: more bytes than the limit, announced, sent or decompressed.
        Overloaded: the bodies of other requests hold the memory of the budget.
        RequestTimeout: the body did not arrive in time.
        ClientDisconnected: the client disconnected before its body was complete.
        UnsupportedMediaType: an encoding other than gzip.
        MalformedJson: the bytes are not gzip.
    """
    context = context_of(request.scope)
    return _receive(request, context, limit, seconds, _check_headers(context, limit))


def read_large(request: Request, limit: int, seconds: float) -> Awaitable[bytes | memoryview]:
    """Return the body as `read_body` does; a large one as a view that is valid until the response is sent."""
    context = context_of(request.scope)
    encoding = _check_headers(context, limit)
    if context.content_length > LARGE_UPLOAD and context.exchange is not None and encoding == b"identity":
        return _upload(context, seconds)
    return _receive(request, context, limit, seconds, encoding)


def _check_headers(context: RequestContext, limit: int) -> bytes:
    """Return the encoding of a body; raise if its headers announce a body that must be rejected."""
    encoding = context.headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b"gzip"):
        shown = encoding[:80].decode("latin-1")
        raise UnsupportedMediaType(f"content encoding {shown!r}: expected an uncompressed or gzip body")
    if context.content_length > limit:
        raise BodyTooLarge(f"{context.content_length} bytes, the limit is {limit} bytes")
    if context.reservation.budget.bytes:  # the first body is accepted whatever its size
        context.reservation.check(context.content_length)
    return encoding


async def _upload(context: RequestContext, seconds: float) -> memoryview:
    """Receive a body of announced length directly into its buffer."""
    assert context.exchange is not None  # as the caller has checked
    view = context.reservation.allocate(context.content_length)
    try:
        async with asyncio.timeout(seconds):
            upload = context.exchange.start_upload(view, context.reservation.take)
            try:
                refusal = await upload.complete
            finally:
                upload.discard_rest()
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive in {seconds:g} s") from None
    if refusal is not None:
        raise refusal
    return view


async def _receive(request: Request, context: RequestContext, limit: int, seconds: float, encoding: bytes) -> bytes:
    exchange, reservation = context.exchange, context.reservation
    body = exchange.complete_body() if exchange else None
    if body is None:
        try:
            async with asyncio.timeout(seconds):
                message = await request.receive()
                if message["type"] == "http.request" and not message.get("more_body"):  # the usual case: one piece
                    body = message.get("body", b"")
                else:
                    body = await _join_pieces(message, request.receive, limit, reservation)
        except TimeoutError:
            raise RequestTimeout(f"the body did not arrive in {seconds:g} s") from None
    if len(body) > limit:
        raise BodyTooLarge(f"more than {limit} bytes")
    if len(body) > reservation.bytes:  # else its pieces were charged as they arrived
        reservation.take(len(body) - reservation.bytes)
    return body if encoding == b"identity" else await asyncio.to_thread(inflate, body, limit, reservation)


async def _join_pieces(message: Message, receive: Receive, limit: int, reservation: BodyReservation) -> bytes:
    """Receive the pieces of a body, of which `message` is the first."""
    body = BytesIO()  # one buffer that grows: a list of pieces would leave holes between those of other requests
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("the client disconnected before its body was complete")
        piece: bytes = message.get("body", b"")
        if body.tell() + len(piece) > limit:
            raise BodyTooLarge(f"more than {limit} bytes")
        reservation.take(len(piece))
        body.write(piece)
        if not message.get("more_body"):
            return body.getvalue()
        message = await receive()


def inflate(body: bytes, limit: int, reservation: BodyReservation) -> bytes:
    """Decompress a gzip body in steps, so that a bomb is dropped as soon as it exceeds the limit.

    Raises:
        BodyTooLarge: more than `limit` bytes decompressed, or too many members.
        Overloaded: the bodies of other requests hold the memory of the budget.
        MalformedJson: not gzip, or truncated.
    """
    inflated, packed = bytearray(), memoryview(body)
    position = members = 0
    try:
        while position < len(packed):  # a gzip file may have several members
            members += 1
            if members > MAX_GZIP_MEMBERS:
                raise BodyTooLarge(f"more than {MAX_GZIP_MEMBERS} gzip members")
            position = _inflate_member(packed, position, inflated, limit, reservation)
    except zlib.error as error:
        raise MalformedJson(f"the body is not gzip: {error}") from None
    return bytes(inflated)


def _inflate_member(
    packed: memoryview, position: int, inflated: bytearray, limit: int, reservation: BodyReservation
) -> int:
    """Decompress one member and return the position of the next."""
    stream, rest = zlib.decompressobj(wbits=31), b""
    while not stream.eof:
        piece = rest or packed[position : position + FEED_STEP]
        position += 0 if rest else len(piece)
        step = stream.decompress(piece, INFLATE_STEP)
        rest = stream.unconsumed_tail
        inflated += step
        if len(inflated) > limit:
            raise BodyTooLarge(f"more than {limit} bytes when inflated")
        reservation.take(len(step))
        if not (step or piece or stream.eof):
            raise MalformedJson("the gzip body is truncated")
    return position - len(stream.unused_data)
