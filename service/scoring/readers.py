"""Read files of any format in chunks of columns of bounded size.

A chunk has the values of the file as Arrow arrays. A malformed line is a row with the reason of its rejection.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from service.errors import InvalidInput
from service.scoring import text_formats
from service.scoring.sources import Source

CHUNK_ROWS = 2**16  # maximum rows of a chunk of Parquet
COLUMN_BUFFER_BYTES = 2**18  # read ahead for each Parquet column, so that RAM is independent of row groups
CHUNK_BYTES = 2**23  # size of a chunk of text
MAX_LINE_BYTES = 2**26  # longer lines mean that the file is not text


@dataclass
class Chunk:
    """Consecutive rows of one file: Arrow columns, the number of the first row, and malformed rows."""

    columns: dict[str, Any]
    rows: int
    first: int
    reasons: dict[int, str] = field(
        default_factory=dict
    )  # reason of each malformed row, by its number within the chunk
    fraction: float = 1.0  # share of the file that is read after this chunk


def read_chunks(source: Source, required: list[str]) -> Iterator[Chunk]:
    """Yield the rows of a file.

    Args:
        source: the file.
        required: names of required columns.

    Raises:
        InvalidInput: the file is malformed or lacks a column.
    """
    read_format = _read_parquet if source.kind == "parquet" else _read_text
    with name_source_in_errors(source):
        yield from read_format(source, required)


def engine_ids_are_integers(sources: list[Source], column: str) -> bool:
    """Return whether every file has engine ids of an integer type, so that the output has it too.

    Raises:
        InvalidInput: a file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for source in sources:
        if source.kind != "parquet" or column in source.partition:
            return False
        with name_source_in_errors(source):
            schema = pq.read_schema(source.path)
            column_type = schema.field(column).type if column in schema.names else None
            if column_type is None or not pa.types.is_integer(column_type):
                return False
            if column_type == pa.uint64():  # the output has int64, which cannot hold its largest values
                return False
    return True


@contextmanager
def name_source_in_errors(source: Source) -> Iterator[None]:
    """Raise errors as InvalidInput, in one line with the name of the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"{source.name}: {reason[:300]}") from None


def _read_parquet(source: Source, required: list[str]) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.path, buffer_size=COLUMN_BUFFER_BYTES, pre_buffer=False) as file:
        names = file.schema_arrow.names
        _check_columns(source, names, required)
        first, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(
            CHUNK_ROWS, columns=[name for name in required if name not in source.partition], use_threads=False
        ):
            columns = {name: batch.column(name) for name in batch.schema.names}
            columns |= {
                k: pa.array([v] * len(batch), pa.string()) for k, v in source.partition.items() if k in required
            }
            yield Chunk(columns, len(batch), first, fraction=(first + len(batch)) / total)
            first += len(batch)


def _read_text(source: Source, required: list[str]) -> Iterator[Chunk]:
    import pyarrow as pa

    first = 0
    with pa.OSFile(str(source.path)) as file:
        stream = file if source.compression is None else pa.CompressedInputStream(file, source.compression)
        text_chunks = read_whole_lines(stream)
        parse: Any = None
        for text_chunk in text_chunks:
            if parse is None:
                parse, text_chunk = _choose_parser(source, text_chunk, required)  # the new chunk has no header
            columns, rows, reasons = parse(text_chunk)
            partition = {k: pa.array([v] * rows, pa.string()) for k, v in source.partition.items() if k in required}
            yield Chunk(columns | partition, rows, first, reasons, file.tell() / max(source.size, 1))
            first += rows
        if parse is None:
            raise ValueError("is empty")


def _choose_parser(source: Source, text_chunk: bytes, required: list[str]) -> tuple[Any, bytes]:
    """Return the parser of the chunks of a text, and the first chunk without its header."""
    if source.kind == "cmapss":
        return partial(text_formats.parse_cmapss, wanted=required), text_chunk
    file_columns = [name for name in required if name not in source.partition]
    if source.kind == "json":
        _check_columns(source, text_formats.read_first_keys(text_chunk), required)
        return partial(text_formats.parse_json, wanted=file_columns), text_chunk
    header, _, text_rows = text_chunk.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n").partition(b"\n")
    delimiter = "\t" if source.kind == "tsv" else ","
    names = text_formats.split_fields(header, delimiter)
    _check_columns(source, names, required)
    return partial(text_formats.parse_csv, names=names, wanted=file_columns, delimiter=delimiter), text_rows


def _check_columns(source: Source, names: list[str], required: list[str]) -> None:
    """Reject a file that lacks a column or has it more than once."""
    available = [*(name for name in names if name not in source.partition), *source.partition]
    absent = [name for name in required if name not in available]
    if absent:
        others = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        hint = "use --map, --engine-column or --cycle-column if it has another name"
        raise InvalidInput(f"{source.name}: no column {absent[0]!r}{others}; {hint}")
    duplicates = [name for name in required if available.count(name) > 1]
    if duplicates:
        raise InvalidInput(f"{source.name}: more than one column {duplicates[0]!r}")


def read_whole_lines(stream: Any, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the content of a stream in chunks of whole lines.

    Raises:
        ValueError: a line is longer than `MAX_LINE_BYTES`.
    """
    pending = b""
    while True:
        content: bytes = stream.read(size)
        if not content:
            break
        pending += content
        end = pending.rfind(b"\n") + 1
        if end:
            yield pending[:end]
            pending = pending[end:]
        elif len(pending) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes; expected text with line breaks")
    if pending:
        yield pending
