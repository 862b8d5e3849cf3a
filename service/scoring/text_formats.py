"""Parse chunks of text into columns: CSV, JSON lines and C-MAPSS numbers. Fast if every line is well-formed.

A chunk with a malformed line is parsed again line by line. So only that line is rejected, with its reason.
Each parser returns Arrow columns, the number of rows, and the reasons of malformed rows.
"""

import csv
import re
from typing import Any

import orjson

from model.data.cmapss import COLUMNS
from service.codecs.requests import MAX_CYCLE

Parsed = tuple[dict[str, Any], int, dict[int, str]]
_GAPS, _LINE_ENDS = re.compile(rb"[ \t\r\f\v]+"), re.compile(rb" *\n *")


def parse_csv(chunk: bytes, names: list[str], wanted: list[str], delimiter: str) -> Parsed:
    """Parse lines of delimited fields. A field may be quoted, but must not contain a line break."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    malformed: list[Any] = []

    def skip(row: Any) -> str:
        malformed.append(row)
        return "skip"

    try:
        table = pacsv.read_csv(
            pa.BufferReader(chunk),
            pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(chunk) + 1),
            pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip),
            pacsv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        return _parse_csv_lines(chunk, names, wanted, delimiter)
    if malformed or table.num_rows == 0:
        return _parse_csv_lines(chunk, names, wanted, delimiter)
    return {name: table.column(name).combine_chunks() for name in wanted}, table.num_rows, {}


def split_fields(line: bytes, delimiter: str) -> list[str]:
    """Return the fields of one line.

    Raises:
        ValueError: the line is not UTF-8, or its quotes do not match.
    """
    try:
        return next(csv.reader([line.decode().rstrip("\r\n")], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise ValueError(str(error)) from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None


def _parse_csv_lines(chunk: bytes, names: list[str], wanted: list[str], delimiter: str) -> Parsed:
    positions = [names.index(name) for name in wanted]
    rows: list[list[str | None]] = []
    reasons: dict[int, str] = {}
    for line in filter(bytes.strip, chunk.split(b"\n")):
        try:
            fields = split_fields(line, delimiter)
            if len(fields) != len(names):
                raise ValueError(f"expected {len(names)} fields, got {len(fields)}")
            rows.append([fields[position] or None for position in positions])
        except ValueError as error:
            reasons[len(rows)] = str(error)
            rows.append([None] * len(positions))
    return _build_columns(wanted, rows), len(rows), reasons


def _build_columns(names: list[str], rows: list[list[str | None]]) -> dict[str, Any]:
    import pyarrow as pa

    columns = zip(*rows, strict=True) if rows else ([] for _ in names)
    return {name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)}


def parse_cmapss(chunk: bytes, wanted: list[str]) -> Parsed:
    """Parse rows of C-MAPSS: unit, cycle, settings and 21 sensors, separated by blanks."""
    single_spaced = _LINE_ENDS.sub(b"\n", _GAPS.sub(b" ", chunk)).strip(b" ")
    return parse_csv(single_spaced, list(COLUMNS), [name for name in COLUMNS if name in wanted], " ")


def read_first_keys(chunk: bytes) -> list[str]:
    """Return the keys of the well-formed objects among the first 100 lines.

    Raises:
        ValueError: no line is a JSON object with a key.
    """
    keys: dict[str, None] = {}
    for line in list(filter(bytes.strip, chunk.split(b"\n")))[:100]:
        try:
            keys |= dict.fromkeys(_parse_object(line))
        except ValueError:
            continue
    if not keys and chunk.strip():
        raise ValueError("expected one JSON object per line")
    return list(keys)


def parse_json(chunk: bytes, wanted: list[str]) -> Parsed:
    """Parse one object per line. Other keys are ignored."""
    import pyarrow as pa
    import pyarrow.json as pajson

    try:
        table = pajson.read_json(
            pa.BufferReader(chunk),
            pajson.ReadOptions(use_threads=False, block_size=len(chunk) + 1),
            pajson.ParseOptions(explicit_schema=_infer_schema(chunk, wanted), unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        return _parse_json_lines(chunk, wanted)
    line_count = len(re.findall(rb"[^\s][^\n]*(?:\n|$)", chunk))
    if table.num_rows != line_count:  # a line has two objects, or an object has two lines
        return _parse_json_lines(chunk, wanted)
    return {name: table.column(name).combine_chunks() for name in wanted}, table.num_rows, {}


def _infer_schema(chunk: bytes, wanted: list[str]) -> Any:
    """Return the types of the first line: text or number. So a text that looks like a time remains a text."""
    import pyarrow as pa

    try:
        first = _parse_object(chunk.lstrip().partition(b"\n")[0])
    except ValueError as error:
        raise pa.ArrowInvalid(str(error)) from None
    types = {name: pa.string() if isinstance(first.get(name), str) else pa.float64() for name in wanted}
    if isinstance(first.get(wanted[0]), int):
        types[wanted[0]] = pa.int64()  # engine ids need all their digits
    return pa.schema(list(types.items()))


def _parse_json_lines(chunk: bytes, wanted: list[str]) -> Parsed:
    rows: list[list[str | None]] = []
    reasons: dict[int, str] = {}
    for line in filter(bytes.strip, chunk.split(b"\n")):
        try:
            fields = _parse_object(line)
            rows.append([_value_to_text(name, fields.get(name)) for name in wanted])
        except ValueError as error:
            reasons[len(rows)] = str(error)
            rows.append([None] * len(wanted))
    return _build_columns(wanted, rows), len(rows), reasons


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return fields


def _value_to_text(name: str, value: Any) -> str | None:
    if isinstance(value, bool | list | dict):
        raise ValueError(f"{name[:80]}: expected a number or a text, got {orjson.dumps(value).decode()[:40]}")
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_CYCLE:
        value = int(value)  # an id of 7.0 is 7, as in a well-formed chunk
    return value if value is None or isinstance(value, str) else repr(value)
