"""Files to chunks of columns, whatever their form; nothing is read whole. The only room that parses.

A chunk holds what stands in the file, as Arrow arrays; a line that cannot be read at all is a row with a reason.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from service.errors import InvalidInput
from service.scoring import text_formats
from service.scoring.sources import Source

ROWS = 2**16  # of a chunk of Parquet
BUFFER = 2**18  # bytes that are read ahead of each Parquet column, so that a row group of any size has room
PIECE = 2**23  # bytes of a chunk of text
LONGEST = 2**26  # bytes of a line; beyond it the file is no text of rows


@dataclass
class Chunk:
    """Some rows of one file, in order: columns of Arrow values, the number of the first row, unreadable rows."""

    columns: dict[str, Any]
    rows: int
    first: int
    reasons: dict[int, str] = field(default_factory=dict)  # by row of this chunk
    fraction: float = 1.0  # of the file, read with it


def chunks(source: Source, wanted: list[str]) -> Iterator[Chunk]:
    """The rows of a file.

    Args:
        source: the file.
        wanted: columns that must be there.

    Raises:
        InvalidInput: the file is not what it says it is, or lacks a column.
    """
    read = _parquet if source.kind == "parquet" else _text
    with told_of(source):
        yield from read(source, wanted)


def whole_numbers(sources: list[Source], column: str) -> bool:
    """Whether the ids of engines are whole numbers by their type, in every file: they are written as such then.

    Raises:
        InvalidInput: a file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for source in sources:
        if source.kind != "parquet" or column in source.partition:
            return False
        with told_of(source):
            schema = pq.read_schema(source.path)
            kind = schema.field(column).type if column in schema.names else None
            if kind is None or not pa.types.is_integer(kind) or kind == pa.uint64():  # whose largest fit no int64
                return False
    return True


@contextmanager
def told_of(source: Source) -> Iterator[None]:
    """What goes wrong, in one line with the name of the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"{source.name}: {reason[:300]}") from None


def _parquet(source: Source, wanted: list[str]) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.path, buffer_size=BUFFER, pre_buffer=False) as file:
        names = file.schema_arrow.names
        _check(source, names, wanted)
        first, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(
            ROWS, columns=[name for name in wanted if name not in source.partition], use_threads=False
        ):
            columns = {name: batch.column(name) for name in batch.schema.names}
            columns |= {k: pa.array([v] * len(batch), pa.string()) for k, v in source.partition.items() if k in wanted}
            yield Chunk(columns, len(batch), first, fraction=(first + len(batch)) / total)
            first += len(batch)


def _text(source: Source, wanted: list[str]) -> Iterator[Chunk]:
    import pyarrow as pa

    first = 0
    with pa.OSFile(str(source.path)) as file:
        stream = file if source.packed is None else pa.CompressedInputStream(file, source.packed)
        pieces = whole_lines(stream)
        parse: Any = None
        for piece in pieces:
            if parse is None:
                parse, piece = _parser(source, piece, wanted)  # without its header
            columns, rows, reasons = parse(piece)
            given = {k: pa.array([v] * rows, pa.string()) for k, v in source.partition.items() if k in wanted}
            yield Chunk(columns | given, rows, first, reasons, file.tell() / max(source.size, 1))
            first += rows
        if parse is None:
            raise ValueError("is empty")


def _parser(source: Source, piece: bytes, wanted: list[str]) -> tuple[Any, bytes]:
    """What parses the pieces of a text, and the first piece without its header."""
    if source.kind == "cmapss":
        return partial(text_formats.numbers, wanted=wanted), piece
    within = [name for name in wanted if name not in source.partition]
    if source.kind == "json":
        _check(source, text_formats.keys_of_first(piece), wanted)
        return partial(text_formats.json, wanted=within), piece
    head, _, rest = piece.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n").partition(b"\n")
    delimiter = "\t" if source.kind == "tsv" else ","
    names = text_formats.fields(head, delimiter)
    _check(source, names, wanted)
    return partial(text_formats.csv, names=names, wanted=within, delimiter=delimiter), rest


def _check(source: Source, names: list[str], wanted: list[str]) -> None:
    """Refuse a file in which a column is absent, or there twice."""
    there = [*(name for name in names if name not in source.partition), *source.partition]
    absent = [name for name in wanted if name not in there]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        hint = "--map, --engine-column and --cycle-column name others"
        raise InvalidInput(f"{source.name}: no column {absent[0]!r}{more}; {hint}")
    twice = [name for name in wanted if there.count(name) > 1]
    if twice:
        raise InvalidInput(f"{source.name}: more than one column {twice[0]!r}")


def whole_lines(stream: Any, size: int = PIECE) -> Iterator[bytes]:
    """The content of a stream in pieces that end with a line.

    Raises:
        ValueError: a line without end.
    """
    left = b""
    while True:
        read: bytes = stream.read(size)
        if not read:
            break
        left += read
        end = left.rfind(b"\n") + 1
        if end:
            yield left[:end]
            left = left[end:]
        elif len(left) > LONGEST:
            raise ValueError(f"a line of more than {LONGEST} bytes")
    if left:
        yield left
