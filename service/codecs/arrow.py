"""Read Arrow streams into columns, and columns into numpy arrays. Independent of the meaning of the columns.

No other codec imports pyarrow. It is imported by the first request that needs it. Numbers are read from its buffers,
because its own conversion to numpy looks for pandas first.
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
    """A column: its name, the name of its Arrow type (with a dictionary, that of the texts), and its values."""

    name: str
    kind: str
    values: Any  # pyarrow.Array

    def numbers(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return the numbers (rows,), and a mask (rows,) that is False where a number is missing."""
        return _read_numbers(self.values)

    def texts(self) -> tuple[npt.NDArray[np.int64], list[str | None]]:
        """Return a code for each row, and the text of each code; a missing text has the code -1, which maps to None."""
        encoded = self.values if hasattr(self.values, "dictionary") else self.values.dictionary_encode()
        codes, present = _read_numbers(encoded.indices)
        return np.where(present, codes.astype(np.int64), -1), [*encoded.dictionary.to_pylist(), None]


class ArrowTable(NamedTuple):
    """Columns of the same length."""

    rows: int
    columns: list[Column]


def read_table(body: bytes | memoryview, limit: int) -> ArrowTable:
    """Return the columns of a stream, each in one piece and validated.

    Args:
        body: the stream.
        limit: maximum of the bytes of all buffers together, when inflated.

    Raises:
        UnsupportedMediaType: pyarrow is not installed.
        MalformedArrow: the body is not an Arrow stream, or it is inconsistent.
        BodyTooLarge: more bytes than the limit when inflated.
        InvalidInput: a column is nested.
    """
    try:
        import pyarrow
    except ImportError:
        message = f"{ARROW} needs pyarrow, which is not installed: install the extra `tables`"
        raise UnsupportedMediaType(message) from None
    bytes_left = limit - inflated_size(body, limit)
    batches = []
    try:
        reader = pyarrow.ipc.open_stream(pyarrow.py_buffer(body), options=pyarrow.ipc.IpcReadOptions(use_threads=False))
        for batch in reader:
            batch.validate()
            bytes_left -= sum(map(_view_bytes, batch.columns))
            if bytes_left < 0:  # checked before the texts are read
                break
            batch.validate(full=True)
            batches.append(batch)
        table = pyarrow.Table.from_batches(batches, reader.schema).combine_chunks()
        columns = [_read_column(field, table.column(k)) for k, field in enumerate(table.schema)]
    except Exception as error:  # pyarrow has many error classes for malformed streams
        raise malformed_stream(str(error).partition("\n")[0][:200]) from None
    if bytes_left < 0:
        raise BodyTooLarge(f"more than {limit} bytes when inflated")
    return ArrowTable(table.num_rows, columns)


def _read_column(field: Any, chunked: Any) -> Column:
    value_type = str(getattr(field.type, "value_type", field.type))
    kind = value_type if value_type in TEXTS else str(field.type)
    return Column(field.name, kind, chunked.chunk(0) if len(chunked) else None)


def _view_bytes(values: Any) -> int:
    """Return the bytes of a column of text views, each text counted once per view; 0 for any other column."""
    values = getattr(values, "dictionary", values)
    if not len(values) or not str(values.type).endswith("_view"):
        return 0
    views = np.frombuffer(values.buffers()[1], np.int32, 4 * len(values)).reshape(-1, 4)
    return int(views[:, 0].clip(0).sum(dtype=np.int64))


def _read_numbers(values: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    validity, data = values.buffers()
    dtype = NUMBERS[str(values.type)]
    numbers = np.frombuffer(data, dtype, len(values), values.offset * dtype.itemsize)
    if validity is None:
        return numbers, np.ones(len(values), dtype=np.bool_)
    bits = np.unpackbits(np.frombuffer(validity, np.uint8), count=values.offset + len(values), bitorder="little")
    return numbers, bits[values.offset :].astype(np.bool_)
