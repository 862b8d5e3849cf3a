"""What an Arrow stream asks for, known from its headers before anything is inflated. Knows bytes, no columns' meaning.

A stream is messages: a header, which is a flatbuffer, and a body of buffers. A short one can ask for any amount of
memory: buffers that inflate, buffers that lie over each other, notes that are told a million times. What is told twice
counts twice here, and nobody else sees a stream that asks for too much.

https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

import struct
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from service.errors import BodyTooLarge, Fault, InvalidInput, MalformedArrow

MAX_MESSAGES = 16384
MAX_COLUMNS = 4096
MAX_HEADER_BYTES = 1 << 20  # bytes of one message's header, and of all notes as often as they are told
METADATA_ENTRY_BYTES = 16  # bytes that a note has beside its texts
MESSAGE_MARKER = 0xFFFFFFFF  # before every message
SCHEMA, DICTIONARY, BATCH = 1, 2, 3  # kinds of message
OLD_COMPRESSION = b"ARROW:experimental_compression"  # how Arrow 0.17 named its codec, beside the header's own field
UINT8, UINT16, UINT32, INT32, INT64 = map(Struct, ("<B", "<H", "<I", "<i", "<q"))


class FlatbufferTable(NamedTuple):
    """A table of a flatbuffer; where its fields stand is told by another table, slot by slot."""

    data: bytes
    at: int

    def place(self, slot: int) -> int:
        """Where a field stands; 0 if it is not there."""
        slots = self.at - read_number(INT32, self.data, self.at)
        there = 4 + 2 * slot < read_number(UINT16, self.data, slots)
        offset = read_number(UINT16, self.data, slots + 4 + 2 * slot) if there else 0
        return self.at + offset if offset else 0

    def number(self, slot: int, kind: Struct) -> int:
        """A number; 0 if it is not there."""
        place = self.place(slot)
        return read_number(kind, self.data, place) if place else 0

    def table(self, slot: int) -> "FlatbufferTable | None":
        """Another table; None if it is not there."""
        place = self.place(slot)
        return FlatbufferTable(self.data, place + read_number(UINT32, self.data, place)) if place else None

    def vector(self, slot: int, size: int) -> tuple[int, int]:
        """Where a list begins and how many elements of `size` bytes it has; none if it is not there."""
        place = self.place(slot)
        if not place:
            return 0, 0
        begin = place + read_number(UINT32, self.data, place)
        count = read_number(UINT32, self.data, begin)
        if begin + 4 + count * size > len(self.data):
            raise struct.error("a list ends behind its header")
        return begin + 4, count

    def tables(self, slot: int) -> "Iterator[FlatbufferTable]":
        """A list of tables."""
        begin, count = self.vector(slot, 4)
        for place in range(begin, begin + 4 * count, 4):
            yield FlatbufferTable(self.data, place + read_number(UINT32, self.data, place))

    def text(self, slot: int) -> bytes:
        """A text; empty if it is not there."""
        begin, count = self.vector(slot, 1)
        return self.data[begin : begin + count]


def read_number(kind: Struct, data: bytes | memoryview, at: int) -> int:
    """A number at a place.

    Raises:
        struct.error: there is no such place.
    """
    if at < 0:  # Python would count from the end
        raise struct.error("a place before the header")
    return int(kind.unpack_from(data, at)[0])


def malformed_stream(why: str) -> MalformedArrow:
    """The error of a body that is no stream, whoever finds it."""
    return MalformedArrow(f"the body is not an Arrow stream: {why}")


def inflated_size(body: bytes | memoryview, limit: int) -> int:
    """Bytes that all buffers of a stream have together, inflated; buffers that share bytes count each for itself.

    Raises:
        MalformedArrow: no stream, or one that asks for more columns, messages or notes than anybody writes.
        BodyTooLarge: more than the limit.
        InvalidInput: a column that holds other columns.
    """
    total = notes = 0
    try:
        for count, (message, at) in enumerate(_read_messages(body)):
            kind, header, notes = message.number(1, UINT8), message.table(2), _add_metadata_bytes(message, 4, notes)
            if header is None or (kind == SCHEMA) != (count == 0) or kind not in (SCHEMA, DICTIONARY, BATCH):
                raise malformed_stream("expected one schema, and batches after it")
            if count > MAX_MESSAGES:
                raise malformed_stream(f"more than {MAX_MESSAGES} messages; write larger batches")
            if kind == SCHEMA:
                notes = _check_schema(header, notes)
            elif batch := header.table(1) if kind == DICTIONARY else header:
                total += _inflated_buffers(batch, body, at)
            if total > limit:
                raise BodyTooLarge(f"more than {limit} bytes when inflated")
    except struct.error:
        raise malformed_stream("it is cut short, or a header makes no sense") from None
    return total


def _read_messages(body: bytes | memoryview) -> Iterator[tuple[FlatbufferTable, int]]:
    """Each message, and where its body begins."""
    at = 0
    while at < len(body):
        mark, size = read_number(UINT32, body, at), read_number(UINT32, body, at + 4)
        at += 8
        if mark != MESSAGE_MARKER or size > MAX_HEADER_BYTES or at + size > len(body):
            raise malformed_stream("no message where one should begin, or one that is cut short")
        if size == 0:
            break
        data = bytes(body[at : at + size])
        at += size
        if OLD_COMPRESSION in data:
            raise malformed_stream("compressed as before Arrow 1.0")
        message = FlatbufferTable(data, read_number(UINT32, data, 0))
        length = message.number(3, INT64)
        if not 0 <= length <= len(body) - at:
            raise malformed_stream("a message is cut short")
        yield message, at
        at += length
    if at != len(body):
        raise malformed_stream(f"{len(body) - at} bytes are left behind its end")


def _check_schema(schema: FlatbufferTable, notes: int) -> int:
    """Refuse columns within columns, which could be told again and again, and too many; the notes up to here."""
    if schema.vector(1, 4)[1] > MAX_COLUMNS:
        raise malformed_stream(f"more than {MAX_COLUMNS} columns")
    notes = _add_metadata_bytes(schema, 2, notes)
    for field in schema.tables(1):
        if field.vector(5, 4)[1]:
            name, message = field.text(0).decode(errors="replace")[:80], "a column of lists or structs is not read"
            raise InvalidInput(f"{name}: {message}", (Fault((name,), message),))
        notes = _add_metadata_bytes(field, 6, notes)
    return notes


def _add_metadata_bytes(table: FlatbufferTable, slot: int, total: int) -> int:
    """Bytes of the notes (custom metadata) of a table, and `total`."""
    total += METADATA_ENTRY_BYTES * table.vector(slot, 4)[1]
    if total <= MAX_HEADER_BYTES:
        total += sum(note.vector(0, 1)[1] + note.vector(1, 1)[1] for note in table.tables(slot))
    if total > MAX_HEADER_BYTES:
        raise malformed_stream(f"more than {MAX_HEADER_BYTES} bytes of metadata")
    return total


def _inflated_buffers(batch: FlatbufferTable, body: bytes | memoryview, at: int) -> int:
    """Bytes of a batch's buffers. A compressed one begins with its size when inflated, or -1 if it is as it is."""
    begin, count = batch.vector(2, 16)
    compressed, total = batch.place(3) != 0, 0
    for offset, length in struct.iter_unpack("<qq", batch.data[begin : begin + 16 * count]):
        if offset < 0 or length < 0 or at + offset + length > len(body):
            raise malformed_stream("a buffer lies behind the end")
        inflated = read_number(INT64, body, at + offset) if compressed and length >= 8 else -1
        total += length if inflated < 0 else inflated
    return total
