"""Limit the memory of an Arrow stream by its headers, before it is inflated. Independent of the columns' meaning.

A stream is a sequence of messages. Each has a header, which is a flatbuffer, and a body of buffers. A short stream can
need any amount of memory: compressed buffers, overlapping buffers, metadata entries that are referenced a million
times. Here, bytes that are referenced twice count twice, and pyarrow never reads a stream above the limits.

https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

import struct
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from service.errors import BodyTooLarge, Fault, InvalidInput, MalformedArrow

MAX_MESSAGES = 16384
MAX_COLUMNS = 4096
MAX_HEADER_BYTES = 1 << 20  # of the header of one message, and of all metadata, counted once per reference
METADATA_ENTRY_BYTES = 16  # of a metadata entry without its key and value
MESSAGE_MARKER = 0xFFFFFFFF  # before every message
SCHEMA, DICTIONARY, BATCH = 1, 2, 3  # kinds of message
OLD_COMPRESSION = b"ARROW:experimental_compression"  # the metadata key in which Arrow 0.17 named its codec
UINT8, UINT16, UINT32, INT32, INT64 = map(Struct, ("<B", "<H", "<I", "<i", "<q"))


class FlatbufferTable(NamedTuple):
    """A table of a flatbuffer at `position` of its bytes; its vtable has the offset of each field, by slot."""

    data: bytes
    position: int

    def field_position(self, slot: int) -> int:
        """Return the position of a field; 0 if it is missing."""
        vtable = self.position - read_number(INT32, self.data, self.position)
        has_slot = 4 + 2 * slot < read_number(UINT16, self.data, vtable)
        offset = read_number(UINT16, self.data, vtable + 4 + 2 * slot) if has_slot else 0
        return self.position + offset if offset else 0

    def number(self, slot: int, kind: Struct) -> int:
        """Return a number; 0 if it is missing."""
        position = self.field_position(slot)
        return read_number(kind, self.data, position) if position else 0

    def table(self, slot: int) -> "FlatbufferTable | None":
        """Return a table; None if it is missing."""
        position = self.field_position(slot)
        return FlatbufferTable(self.data, position + read_number(UINT32, self.data, position)) if position else None

    def vector(self, slot: int, size: int) -> tuple[int, int]:
        """Return the position of a list of elements of `size` bytes, and its length; zeros if it is missing."""
        position = self.field_position(slot)
        if not position:
            return 0, 0
        begin = position + read_number(UINT32, self.data, position)
        count = read_number(UINT32, self.data, begin)
        if begin + 4 + count * size > len(self.data):
            raise struct.error("a list ends behind its header")
        return begin + 4, count

    def tables(self, slot: int) -> "Iterator[FlatbufferTable]":
        """Yield the tables of a list."""
        begin, count = self.vector(slot, 4)
        for position in range(begin, begin + 4 * count, 4):
            yield FlatbufferTable(self.data, position + read_number(UINT32, self.data, position))

    def text(self, slot: int) -> bytes:
        """Return a text; empty if it is missing."""
        begin, count = self.vector(slot, 1)
        return self.data[begin : begin + count]


def read_number(kind: Struct, data: bytes | memoryview, position: int) -> int:
    """Return the number at a position.

    Raises:
        struct.error: the position is outside of the data.
    """
    if position < 0:  # Python would count from the end
        raise struct.error("a place before the header")
    return int(kind.unpack_from(data, position)[0])


def malformed_stream(reason: str) -> MalformedArrow:
    """Return the error of a body that is not an Arrow stream."""
    return MalformedArrow(f"the body is not an Arrow stream: {reason}")


def inflated_size(body: bytes | memoryview, limit: int) -> int:
    """Return the bytes of all buffers of a stream, inflated; bytes that several buffers share count for each.

    Raises:
        MalformedArrow: no stream, or one with too many columns, messages or metadata.
        BodyTooLarge: more than the limit.
        InvalidInput: a column is nested.
    """
    total = metadata_bytes = 0
    try:
        for count, (message, body_begin) in enumerate(_read_messages(body)):
            kind, header = message.number(1, UINT8), message.table(2)
            metadata_bytes = _add_metadata_bytes(message, 4, metadata_bytes)
            if header is None or (kind == SCHEMA) != (count == 0) or kind not in (SCHEMA, DICTIONARY, BATCH):
                raise malformed_stream("expected one schema, and batches after it")
            if count > MAX_MESSAGES:
                raise malformed_stream(f"more than {MAX_MESSAGES} messages; write larger batches")
            if kind == SCHEMA:
                metadata_bytes = _check_schema(header, metadata_bytes)
            elif batch := header.table(1) if kind == DICTIONARY else header:
                total += _inflated_buffers(batch, body, body_begin)
            if total > limit:
                raise BodyTooLarge(f"more than {limit} bytes when inflated")
    except struct.error:
        raise malformed_stream("it is cut short, or a header makes no sense") from None
    return total


def _read_messages(body: bytes | memoryview) -> Iterator[tuple[FlatbufferTable, int]]:
    """Yield each message, and the position of its body."""
    position = 0
    while position < len(body):
        marker, size = read_number(UINT32, body, position), read_number(UINT32, body, position + 4)
        position += 8
        if marker != MESSAGE_MARKER or size > MAX_HEADER_BYTES or position + size > len(body):
            raise malformed_stream("no message where one should begin, or one that is cut short")
        if size == 0:
            break
        data = bytes(body[position : position + size])
        position += size
        if OLD_COMPRESSION in data:
            raise malformed_stream("compressed as before Arrow 1.0")
        message = FlatbufferTable(data, read_number(UINT32, data, 0))
        length = message.number(3, INT64)
        if not 0 <= length <= len(body) - position:
            raise malformed_stream("a message is cut short")
        yield message, position
        position += length
    if position != len(body):
        raise malformed_stream(f"{len(body) - position} bytes are left behind its end")


def _check_schema(schema: FlatbufferTable, metadata_bytes: int) -> int:
    """Reject too many columns, and nested ones, which could be referenced any number of times.

    Return `metadata_bytes` with the metadata of the schema added.
    """
    if schema.vector(1, 4)[1] > MAX_COLUMNS:
        raise malformed_stream(f"more than {MAX_COLUMNS} columns")
    metadata_bytes = _add_metadata_bytes(schema, 2, metadata_bytes)
    for field in schema.tables(1):
        if field.vector(5, 4)[1]:
            name, message = field.text(0).decode(errors="replace")[:80], "columns of lists or structs are not supported"
            raise InvalidInput(f"{name}: {message}", (Fault((name,), message),))
        metadata_bytes = _add_metadata_bytes(field, 6, metadata_bytes)
    return metadata_bytes


def _add_metadata_bytes(table: FlatbufferTable, slot: int, total: int) -> int:
    """Return `total` with the bytes of the custom metadata of a table added."""
    total += METADATA_ENTRY_BYTES * table.vector(slot, 4)[1]
    if total <= MAX_HEADER_BYTES:
        total += sum(entry.vector(0, 1)[1] + entry.vector(1, 1)[1] for entry in table.tables(slot))
    if total > MAX_HEADER_BYTES:
        raise malformed_stream(f"more than {MAX_HEADER_BYTES} bytes of metadata")
    return total


def _inflated_buffers(batch: FlatbufferTable, body: bytes | memoryview, body_begin: int) -> int:
    """Return the bytes of the buffers of a batch, inflated.

    A buffer of a compressed batch begins with its inflated size, or with -1 if it is not compressed.
    """
    begin, count = batch.vector(2, 16)
    compressed, total = batch.field_position(3) != 0, 0
    for offset, length in struct.iter_unpack("<qq", batch.data[begin : begin + 16 * count]):
        if offset < 0 or length < 0 or body_begin + offset + length > len(body):
            raise malformed_stream("a buffer is beyond the end of the stream")
        inflated = read_number(INT64, body, body_begin + offset) if compressed and length >= 8 else -1
        total += length if inflated < 0 else inflated
    return total
