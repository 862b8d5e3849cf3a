"""The only pyarrow: an Arrow stream to columns, and columns to numpy. Knows no column's meaning.

It is imported by the first request that needs it. Numbers are taken from its buffers: its own way to numpy looks for
pandas first.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.codecs.arrow_limits import inflated_size, malformed_stream
from service.errors import BodyTooLarge, UnsupportedMediaType

ARROW = "application/vnd.apache.arrow.stream"
INTEGERS = {f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
NUMBERS = INTEGERS | {"halffloat": np.dtype("f2"), "float": np.dtype("f4"), "double": np.dtype("f8")}
TEXTS = ("string", "large_string", "string_view")
NULLS = "null"  # the type of a column that never had a value


class Column(NamedTuple):
    """A column: its name, its type as Arrow calls it (of texts in a dictionary, that of the texts), and its values."""

    name: str
    kind: str
    values: Any  # pyarrow.Array

    def numbers(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """The numbers (rows,), and where there is one."""
        return _read_numbers(self.values)

    def texts(self) -> tuple[npt.NDArray[np.int64], list[str | None]]:
        """A code for each row, and the text of each code; the text of what is missing is None."""
        coded = self.values if hasattr(self.values, "dictionary") else self.values.dictionary_encode()
        codes, present = _read_numbers(coded.indices)
        return np.where(present, codes.astype(np.int64), -1), [*coded.dictionary.to_pylist(), None]


class ArrowTable(NamedTuple):
    """Columns of the same length."""

    rows: int
    columns: list[Column]


def read_table(body: bytes | memoryview, limit: int) -> ArrowTable:
    """A stream as columns, each in one piece, proven to be what it says it is.

    Args:
        body: the stream.
        limit: bytes that its buffers may have together, inflated.

    Raises:
        UnsupportedMediaType: pyarrow is not installed.
        MalformedArrow: no Arrow stream, or one that contradicts itself.
        BodyTooLarge: more bytes than the limit when inflated.
        InvalidInput: a column that holds other columns.
    """
    try:
        import pyarrow
    except ImportError:
        message = f"{ARROW} needs pyarrow, which this service lacks: install engine-health[tables]"
        raise UnsupportedMediaType(message) from None
    left = limit - inflated_size(body, limit)
    batches = []
    try:
        reader = pyarrow.ipc.open_stream(pyarrow.py_buffer(body), options=pyarrow.ipc.IpcReadOptions(use_threads=False))
        for batch in reader:
            batch.validate()
            left -= sum(map(_view_bytes, batch.columns))
            if left < 0:  # before anybody reads those texts
                break
            batch.validate(full=True)
            batches.append(batch)
        table = pyarrow.Table.from_batches(batches, reader.schema).combine_chunks()
        columns = [_read_column(field, table.column(k)) for k, field in enumerate(table.schema)]
    except Exception as error:  # pyarrow raises a class of its own for each way a stream can be broken
        raise malformed_stream(str(error).partition("\n")[0][:200]) from None
    if left < 0:
        raise BodyTooLarge(f"more than {limit} bytes when inflated")
    return ArrowTable(table.num_rows, columns)


def _read_column(field: Any, chunked: Any) -> Column:
    text = str(getattr(field.type, "value_type", field.type))
    return Column(field.name, text if text in TEXTS else str(field.type), chunked.chunk(0) if len(chunked) else None)


def _view_bytes(values: Any) -> int:
    """Bytes of texts that are views, each counted as often as it is pointed at; 0 of any other column."""
    values = getattr(values, "dictionary", values)
    if not len(values) or not str(values.type).endswith("_view"):
        return 0
    views = np.frombuffer(values.buffers()[1], np.int32, 4 * len(values)).reshape(-1, 4)
    return int(views[:, 0].clip(0).sum(dtype=np.int64))


def _read_numbers(values: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    validity, data = values.buffers()
    kind = NUMBERS[str(values.type)]
    numbers = np.frombuffer(data, kind, len(values), values.offset * kind.itemsize)
    if validity is None:
        return numbers, np.ones(len(values), dtype=np.bool_)
    bits = np.unpackbits(np.frombuffer(validity, np.uint8), count=values.offset + len(values), bitorder="little")
    return numbers, bits[values.offset :].astype(np.bool_)
