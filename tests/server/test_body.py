import asyncio
import gzip
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from service.errors import (
    BodyTooLarge,
    ClientDisconnected,
    MalformedJson,
    Overloaded,
    RequestTimeout,
    ServiceError,
    UnsupportedMediaType,
)
from service.server.body import (
    FEED_STEP,
    INFLATE_STEP,
    LARGE_UPLOAD,
    MAX_GZIP_MEMBERS,
    inflate,
    read_body,
    read_large,
)
from service.server.body_budget import BodyBudget, BodyReservation
from service.server.scope import CONTEXT, RequestContext

LIMIT = 1000
NOISE = np.random.default_rng(0).bytes(3 * FEED_STEP)  # gzip does not shorten it


def piece(body: bytes, more: bool = False) -> dict[str, Any]:
    """Return a message with a part of a body."""
    return {"type": "http.request", "body": body, "more_body": more}


class Call:
    """One request: its messages, its context and the number of messages that were received."""

    def __init__(self, *messages: dict[str, Any], length: int = 0, budget: int = 10**9, **context: Any) -> None:
        self.messages, self.received = list(messages), 0
        self.reservation = BodyReservation(BodyBudget(budget))
        self.context = RequestContext(content_length=length, reservation=self.reservation, **context)
        self.request = Request({"type": "http", CONTEXT: self.context}, self.receive)

    async def receive(self) -> dict[str, Any]:
        if self.received == len(self.messages):
            await asyncio.get_running_loop().create_future()  # never completes
        self.received += 1
        return self.messages[self.received - 1]

    def read(self, limit: int = LIMIT, seconds: float = 60, how: Callable[..., Any] = read_body) -> Any:
        """Return the body as the application gets it."""

        async def scene() -> Any:
            return await how(self.request, limit, seconds)

        return asyncio.run(scene())


def encoded(encoding: bytes) -> dict[str, Any]:
    """Return the context of a request with a content encoding."""
    return {"headers": {b"content-encoding": encoding}}


def reservation(budget: int = 10**9) -> BodyReservation:
    """Return a reservation of a new budget."""
    return BodyReservation(BodyBudget(budget))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([piece(b"whole")], b"whole"),
        ([{"type": "http.request"}], b""),
        ([piece(b"a", True), piece(b"b", True), piece(b"c")], b"abc"),
        ([piece(b"a", True), {"type": "http.request", "more_body": True}, {"type": "http.request"}], b"a"),
        ([{"type": "http.request", "more_body": True}, piece(b"b")], b"b"),
        ([piece(b"x" * LIMIT)], b"x" * LIMIT),
        ([piece(b"x" * 999, True), piece(b"y")], b"x" * 999 + b"y"),
    ],
)
@pytest.mark.parametrize("how", [read_body, read_large])
def test_body_in_pieces_is_read_and_charged_once(
    messages: list[dict[str, Any]], expected: bytes, how: Callable[..., Any]
) -> None:
    """The pieces of a body within the limit are joined, and its length is charged to the budget once."""
    call = Call(*messages, length=len(expected))
    assert expected == call.read(how=how)
    assert (len(messages), len(expected)) == (call.received, call.reservation.bytes)


@pytest.mark.parametrize(
    "messages",
    [
        [piece(b"x" * (LIMIT + 1))],
        [piece(b"x" * LIMIT, True), piece(b"y")],
        [piece(b"x" * LIMIT, True), piece(b"y", True)],  # rejected before the end
    ],
)
def test_body_beyond_the_limit_is_rejected(messages: list[dict[str, Any]]) -> None:
    """A body of one byte more than the limit is rejected, in one piece or in several."""
    with pytest.raises(BodyTooLarge, match=f"^more than {LIMIT} bytes$"):
        Call(*messages).read()


@pytest.mark.parametrize("how", [read_body, read_large])
def test_body_announced_beyond_the_limit_is_rejected_unread(how: Callable[..., Any]) -> None:
    """An announced length above the limit is rejected before anything is received."""
    call = Call(length=LIMIT + 1)
    with pytest.raises(BodyTooLarge, match=r"^1001 bytes, the limit is 1000 bytes$"):
        call.read(how=how)
    assert 0 == call.received


@pytest.mark.parametrize(
    "messages", [[], [piece(b"a", True)], [piece(b"a", True), piece(b"b", True)]], ids=["none", "first", "second"]
)
def test_late_body_is_rejected(messages: list[dict[str, Any]]) -> None:
    """A body that is incomplete after `seconds` is rejected, and the error hides its internal cause."""
    with pytest.raises(RequestTimeout, match=r"^the body did not arrive in 0\.01 s$") as refusal:
        Call(*messages).read(seconds=0.01)
    assert refusal.value.__suppress_context__


@pytest.mark.parametrize("messages", [[], [piece(b"a", True)]], ids=["at first", "later"])
def test_body_of_a_disconnected_client_raises(messages: list[dict[str, Any]]) -> None:
    """A disconnect before the end of the body raises ClientDisconnected."""
    with pytest.raises(ClientDisconnected, match=r"^the client disconnected before its body was complete$"):
        Call(*messages, {"type": "http.disconnect"}).read()


@pytest.mark.parametrize("held", [0, 2, 5])
def test_body_charged_in_part_is_charged_for_the_rest(held: int) -> None:
    """Bytes that were charged on arrival are not charged again."""
    call = Call(exchange=Exchange(b"whole"), length=5)
    call.reservation.take(held)
    assert b"whole" == call.read()
    assert 5 == call.reservation.bytes


def test_body_in_pieces_beyond_budget_is_rejected() -> None:
    """Each piece is charged as it arrives, and rejected when the budget is used up by other requests."""
    call = Call(piece(b"x" * 60, True), piece(b"y" * 60), budget=100)
    call.reservation.budget.bytes = 10  # charged by another request
    with pytest.raises(Overloaded):
        call.read()
    assert 60 == call.reservation.bytes


def test_announced_body_beyond_budget_is_rejected_unread() -> None:
    """An announced length beyond the rest of the budget is rejected before anything is received."""
    refused, fits = (Call(piece(b"x" * 10), length=length, budget=100) for length in (11, 10))
    for call in (refused, fits):
        call.reservation.budget.bytes = 90
    with pytest.raises(Overloaded):
        refused.read()
    assert 0 == refused.received
    assert b"x" * 10 == fits.read()


@pytest.mark.parametrize("encoding", [b"gzip", b" GZip "], ids=["lower", "mixed"])
def test_gzip_body_is_decompressed_and_charged_twice(encoding: bytes) -> None:
    """A gzip body is returned decompressed, and its compressed and decompressed bytes are both charged."""
    packed = gzip.compress(b"x" * 500)
    for how in (read_body, read_large):
        call = Call(piece(packed), **encoded(encoding))
        assert b"x" * 500 == call.read(how=how)
        assert len(packed) + 500 == call.reservation.bytes
    with pytest.raises(BodyTooLarge, match=r"^more than 499 bytes when inflated$"):
        Call(piece(packed), **encoded(encoding)).read(limit=499)


@pytest.mark.parametrize("encoding", [b"identity", b" Identity"], ids=["lower", "mixed"])
def test_identity_body_is_not_decompressed(encoding: bytes) -> None:
    """The encoding `identity` leaves a body unchanged."""
    packed = gzip.compress(b"x")
    assert packed == Call(piece(packed), **encoded(encoding)).read()


@pytest.mark.parametrize("how", [read_body, read_large])
def test_body_of_another_encoding_is_rejected_unread(how: Callable[..., Any]) -> None:
    """An encoding other than gzip is rejected with its name, of which at most 80 bytes are shown."""
    call = Call(piece(b"x"), **encoded(b"B\xe9R" + b"o" * 200))
    shown = "bér" + "o" * 77
    with pytest.raises(UnsupportedMediaType, match=f"^content encoding '{shown}': expected an uncompressed or gzip"):
        call.read(how=how)
    assert 0 == call.received


def test_gzip_of_several_members_and_steps_is_inflated() -> None:
    """Members of any size, including empty ones, are inflated in steps and joined."""
    parts = [NOISE, b"", b"x" * (2 * INFLATE_STEP + 1), b"y", NOISE[:-1]]
    packed, held = b"".join(map(gzip.compress, parts)), reservation()
    assert b"".join(parts) == inflate(packed, 10**8, held)
    assert sum(map(len, parts)) == held.bytes
    assert b"" == inflate(b"", 10, held)


def test_gzip_with_a_long_header_is_inflated() -> None:
    """A gzip header that is longer than one step does not end the body."""
    named = BytesIO()
    with gzip.GzipFile("x" * (2 * FEED_STEP), "wb", fileobj=named) as file:
        file.write(b"content")
    assert b"content" == inflate(named.getvalue(), 10, reservation())


def test_gzip_bomb_is_rejected_at_the_limit() -> None:
    """Inflation stops in the step that exceeds the limit, and no more than the limit is charged."""
    bomb, held = gzip.compress(bytes(5 * INFLATE_STEP)), reservation()
    assert 5 * INFLATE_STEP == len(inflate(bomb, 5 * INFLATE_STEP, reservation()))
    with pytest.raises(BodyTooLarge, match="when inflated"):
        inflate(bomb, 2 * INFLATE_STEP, held)
    assert 2 * INFLATE_STEP == held.bytes


def test_gzip_is_rejected_when_the_budget_is_used_up() -> None:
    """Decompressed bytes beyond the rest of the budget are rejected."""
    held = reservation(INFLATE_STEP)
    held.budget.bytes = 1
    with pytest.raises(Overloaded):
        inflate(gzip.compress(bytes(2 * INFLATE_STEP)), 10**8, held)


def test_gzip_of_too_many_members_is_rejected() -> None:
    """The maximum number of members is inflated, and one more is rejected."""
    member = gzip.compress(b"")
    assert b"" == inflate(member * MAX_GZIP_MEMBERS, 10, reservation())
    with pytest.raises(BodyTooLarge, match=f"^more than {MAX_GZIP_MEMBERS} gzip members$"):
        inflate(member * (MAX_GZIP_MEMBERS + 1), 10, reservation())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "^the body is not gzip: "),
        (zlib.compress(b"x"), "^the body is not gzip: "),
        (gzip.compress(b"x") + b"garbage", "^the body is not gzip: "),
        (gzip.compress(b"x")[:-5] + b"12345", "^the body is not gzip: "),  # wrong checksum
        (gzip.compress(b"x")[:-1], "^the gzip body is truncated$"),
        (gzip.compress(NOISE)[:FEED_STEP], "^the gzip body is truncated$"),
        (gzip.compress(b"x") * 2 + gzip.compress(b"x")[:5], "^the gzip body is truncated$"),
    ],
    ids=["plain", "zlib", "garbage", "sum", "end", "middle", "member"],
)
def test_broken_gzip_is_malformed(body: bytes, message: str) -> None:
    """Bytes that are not gzip, trailing garbage, a wrong checksum and a missing end are malformed."""
    with pytest.raises(MalformedJson, match=message) as refusal:
        inflate(body, 10**8, reservation())
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


class Upload:
    """An upload that completes with a result, or never."""

    def __init__(self, result: ServiceError | None, complete: bool) -> None:
        self.complete = asyncio.get_running_loop().create_future()
        self.discarded = 0
        if complete:
            self.complete.set_result(result)

    def discard_rest(self) -> None:
        self.discarded += 1


class Exchange:
    """A direct exchange with a server: a body that is complete, or one to be uploaded."""

    def __init__(self, body: bytes | None = None, result: ServiceError | None = None, complete: bool = True) -> None:
        self.body, self.result, self.complete = body, result, complete
        self.upload: Upload | None = None

    def complete_body(self) -> bytes | None:
        return self.body

    def start_upload(self, view: memoryview, charge: Callable[[int], None]) -> Upload:
        charge(len(view) if self.complete else 1)
        view[:3] = b"abc"
        self.upload = Upload(self.result, self.complete)
        return self.upload


@pytest.mark.parametrize("how", [read_body, read_large])
def test_complete_body_of_an_exchange_is_not_received(how: Callable[..., Any]) -> None:
    """A body that is complete at the server is returned without a message, and charged."""
    call = Call(exchange=Exchange(b"whole"), length=5)
    assert b"whole" == call.read(how=how)
    assert (0, 5) == (call.received, call.reservation.bytes)
    assert b"" == Call(exchange=Exchange(b"")).read(how=how)
    with pytest.raises(BodyTooLarge):
        Call(exchange=Exchange(b"x" * (LIMIT + 1))).read(how=how)
    call = Call(piece(b"later"), exchange=Exchange(None))
    assert b"later" == call.read(how=how)


def test_large_body_is_uploaded_into_its_buffer() -> None:
    """A body longer than 1 MiB is received into a buffer of its length, which is charged once."""
    call = Call(exchange=Exchange(), length=LARGE_UPLOAD + 1)
    view = call.read(LARGE_UPLOAD + 1, how=read_large)
    assert isinstance(view, memoryview)
    assert (LARGE_UPLOAD + 1, b"abc") == (len(view), bytes(view[:3]))
    assert (0, LARGE_UPLOAD + 1) == (call.received, call.reservation.bytes)
    upload = call.context.exchange.upload  # type: ignore[union-attr]  # the exchange of this test
    assert 1 == upload.discarded


@pytest.mark.parametrize(
    ("context", "how"),
    [
        ({"length": LARGE_UPLOAD}, read_large),
        ({"length": LARGE_UPLOAD + 1, **encoded(b"gzip")}, read_large),
        ({"length": LARGE_UPLOAD + 1}, read_body),
    ],
)
def test_short_or_compressed_body_is_not_uploaded(context: dict[str, Any], how: Callable[..., Any]) -> None:
    """A body of at most 1 MiB, a compressed one and one read as bytes are received as messages."""
    exchange = Exchange()
    assert b"" == Call(
        piece(gzip.compress(b"")) if "headers" in context else piece(b""), exchange=exchange, **context
    ).read(2 * LARGE_UPLOAD, how=how)
    assert exchange.upload is None


def test_upload_without_an_exchange_is_received_in_messages() -> None:
    """Another server provides no direct exchange, and a large body is received as messages."""
    assert b"x" == Call(piece(b"x"), length=LARGE_UPLOAD + 1).read(2 * LARGE_UPLOAD, how=read_large)


@pytest.mark.parametrize("complete", [True, False])
def test_upload_failed_or_late_is_discarded(complete: bool) -> None:
    """A failed upload raises its error and a late one a timeout; the rest of the body is discarded."""
    exchange = Exchange(result=Overloaded("full", 1.0), complete=complete)
    call = Call(exchange=exchange, length=LARGE_UPLOAD + 1)
    message = "^full$" if complete else r"^the body did not arrive in 0\.01 s$"
    with pytest.raises(Overloaded if complete else RequestTimeout, match=message) as refusal:
        call.read(2 * LARGE_UPLOAD, 60 if complete else 0.01, how=read_large)
    assert complete or refusal.value.__suppress_context__
    assert exchange.upload is not None
    assert 1 == exchange.upload.discarded
