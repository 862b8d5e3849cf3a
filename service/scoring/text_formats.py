"""Pieces of text to columns: CSV, JSON lines, and the bare numbers of C-MAPSS. Fast where every line is well-formed.

A piece in which any line is not is read again line by line, so that the others are kept and that one has its reason.
Each function answers columns of Arrow values, how many rows there are, and which cannot be read, and why.
"""

import csv as python_csv
import re
from typing import Any

import orjson

from model.data.cmapss import COLUMNS
from service.codecs.requests import MAX_CYCLE

Parsed = tuple[dict[str, Any], int, dict[int, str]]
_GAPS, _ENDS = re.compile(rb"[ \t\r\f\v]+"), re.compile(rb" *\n *")


def csv(piece: bytes, names: list[str], wanted: list[str], delimiter: str) -> Parsed:
    """Lines of delimited fields. A field may be quoted, and holds no line break."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    wrong: list[Any] = []

    def skip(row: Any) -> str:
        wrong.append(row)
        return "skip"

    try:
        table = pacsv.read_csv(
            pa.BufferReader(piece),
            pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(piece) + 1),
            pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip),
            pacsv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        return _csv_by_line(piece, names, wanted, delimiter)
    if wrong or table.num_rows == 0:
        return _csv_by_line(piece, names, wanted, delimiter)
    return {name: table.column(name).combine_chunks() for name in wanted}, table.num_rows, {}


def fields(line: bytes, delimiter: str) -> list[str]:
    """The fields of one line.

    Raises:
        ValueError: it is no UTF-8, or its quotes do not match.
    """
    try:
        return next(python_csv.reader([line.decode().rstrip("\r\n")], delimiter=delimiter, strict=True), [])
    except python_csv.Error as error:
        raise ValueError(str(error)) from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None


def _csv_by_line(piece: bytes, names: list[str], wanted: list[str], delimiter: str) -> Parsed:
    places = [names.index(name) for name in wanted]
    rows: list[list[str | None]] = []
    reasons: dict[int, str] = {}
    for line in filter(bytes.strip, piece.split(b"\n")):
        try:
            found = fields(line, delimiter)
            if len(found) != len(names):
                raise ValueError(f"expected {len(names)} fields, found {len(found)}")
            rows.append([found[place] or None for place in places])
        except ValueError as error:
            reasons[len(rows)] = str(error)
            rows.append([None] * len(places))
    return _columns(wanted, rows), len(rows), reasons


def _columns(names: list[str], rows: list[list[str | None]]) -> dict[str, Any]:
    import pyarrow as pa

    columns = zip(*rows, strict=True) if rows else ([] for _ in names)
    return {name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)}


def numbers(piece: bytes, wanted: list[str]) -> Parsed:
    """Rows of C-MAPSS: unit, cycle, settings and 21 sensors, parted by blanks."""
    even = _ENDS.sub(b"\n", _GAPS.sub(b" ", piece)).strip(b" ")
    return csv(even, list(COLUMNS), [name for name in COLUMNS if name in wanted], " ")


def keys_of_first(piece: bytes) -> list[str]:
    """The keys of the first objects that can be read, up to a hundred of them.

    Raises:
        ValueError: there is none among them.
    """
    keys: dict[str, None] = {}
    for line in list(filter(bytes.strip, piece.split(b"\n")))[:100]:
        try:
            keys |= dict.fromkeys(_object(line))
        except ValueError:
            continue
    if not keys and piece.strip():
        raise ValueError("no JSON object a line")
    return list(keys)


def json(piece: bytes, wanted: list[str]) -> Parsed:
    """An object a line; other keys are not looked at."""
    import pyarrow as pa
    import pyarrow.json as pajson

    try:
        table = pajson.read_json(
            pa.BufferReader(piece),
            pajson.ReadOptions(use_threads=False, block_size=len(piece) + 1),
            pajson.ParseOptions(explicit_schema=_schema(piece, wanted), unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        return _json_by_line(piece, wanted)
    if table.num_rows != len(
        re.findall(rb"[^\s][^\n]*(?:\n|$)", piece)
    ):  # a line with two objects, or one over two lines
        return _json_by_line(piece, wanted)
    return {name: table.column(name).combine_chunks() for name in wanted}, table.num_rows, {}


def _schema(piece: bytes, wanted: list[str]) -> Any:
    """Types as in the first line, where they are usual: a time among texts stays a text."""
    import pyarrow as pa

    kinds = {int: pa.float64(), float: pa.float64(), str: pa.string()}
    try:
        first = _object(piece.lstrip().partition(b"\n")[0])
    except ValueError as error:
        raise pa.ArrowInvalid(str(error)) from None
    found = {name: kinds.get(type(first.get(name)), pa.float64()) for name in wanted}
    if isinstance(first.get(wanted[0]), int):
        found[wanted[0]] = pa.int64()  # the id of an engine keeps all its digits
    return pa.schema(list(found.items()))


def _json_by_line(piece: bytes, wanted: list[str]) -> Parsed:
    rows: list[list[str | None]] = []
    reasons: dict[int, str] = {}
    for line in filter(bytes.strip, piece.split(b"\n")):
        try:
            found = _object(line)
            rows.append([_as_text(name, found.get(name)) for name in wanted])
        except ValueError as error:
            reasons[len(rows)] = str(error)
            rows.append([None] * len(wanted))
    return _columns(wanted, rows), len(rows), reasons


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _as_text(name: str, value: Any) -> str | None:
    if isinstance(value, bool | list | dict):
        raise ValueError(f"{name[:80]}: expected a number or a text, got {orjson.dumps(value).decode()[:40]}")
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_CYCLE:
        value = int(value)  # an id of 7.0 is 7, as in a piece that is read at once
    return value if value is None or isinstance(value, str) else repr(value)
