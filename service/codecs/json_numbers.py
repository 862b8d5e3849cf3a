"""Long and nested JSON lists of numbers to arrays, without a Python object per number; None for unusual text.

Long texts are parsed in pieces of 1 MiB: a parser holds the interpreter lock until it returns, and keeps buffers
for the longest text. Where the result is None, `diagnose` examines the values one by one.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import msgspec
import numpy as np

from model.numerics import Floats
from service.codecs import number_parser
from service.codecs.number_parser import DECLINED, PARSE_BYTES, NumberArray, count_brackets, to_float32
from service.inference.onnx_model import Batch

MAX_ROW_BYTES = 4 * PARSE_BYTES  # no row of numbers is longer, and a parser keeps buffers for the longest text
NULL_SENTINEL = b" 1e300 "  # replaces null while it is parsed: not a float32; spaces separate it from other text


def parse_rows(text: bytes, width: int, hold: bool = False) -> Floats | None:
    """Return a list of rows of `width` numbers as (T, width); null as NaN with `hold`. None for unusual text."""
    parts = []
    for piece in [text] if len(text) <= PARSE_BYTES else split_rows(text):
        part = _parse_piece(piece, "d", width, hold) if len(piece) <= MAX_ROW_BYTES else None
        if part is None:
            return None
        parts.append(part)
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return flat.reshape(-1, width)


def parse_joint_rows(texts: Sequence[bytes | memoryview], width: int) -> Sequence[Batch] | Batch | None:
    """Parse lists of rows of `width` numbers in one pass, each to (T, width) in float32; None if one is unusual.

    The result is one array if all lists have the same number of rows.

    Each text begins and ends with a bracket. A zero after each separates the texts: if one of them is not exactly one
    list, a zero is in the place of a row or of a list, and the parser declines. Other texts cannot compensate for it.
    """
    text = b"[%b,0]" % b",0,".join(texts)
    try:
        doubles, lengths = number_parser.active.tables(text, width)
    except DECLINED:
        return None
    if len(lengths) != len(texts) or count_brackets(text) != 1 + len(texts) + sum(lengths):
        return None  # a list within a row would be flattened
    flat = to_float32(doubles)
    if flat is None:
        return None
    if len(set(lengths)) == 1:
        return flat.reshape(len(texts), -1)[:, :-1].reshape(len(texts), -1, width)  # without the zeros
    begins = accumulate((1 + width * length for length in lengths), initial=0)
    return [flat[begin : begin + width * n].reshape(-1, width) for begin, n in zip(begins, lengths, strict=False)]


def parse_columns(text: bytes, names: tuple[str, ...], hold: bool = False) -> Floats | None:
    """Return an object of columns of equal length as (T, names); null as NaN with `hold`. None for unusual text."""
    try:
        columns = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if columns.keys() != set(names) or not names:
        return None
    texts = [bytes(columns[name]) for name in names]
    values = [parse_numbers(text, "d", hold) if count_brackets(text) == 1 else None for text in texts]
    lengths = {0 if column is None else len(column) for column in values}
    return np.stack(values, axis=1) if len(lengths) == 1 and lengths != {0} else None  # type: ignore[arg-type]  # none is None


def parse_numbers(text: bytes, kind: Literal["d", "i"], hold: bool = False) -> NumberArray | None:
    """Return all numbers of a flat or nested list in order, as float64 or int64; null as NaN with `hold`."""
    parts = []
    for piece in [text] if len(text) <= PARSE_BYTES else split_nested(text):
        part = _parse_piece(piece, kind, None, hold)
        if part is None:
            return None
        parts.append(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _parse_piece(text: bytes, kind: Literal["d", "i"], width: int | None, hold: bool) -> NumberArray | None:
    """Return the numbers of a list, whose rows must have `width` numbers unless it is None; None for unusual text."""
    missing = text.count(b"null") if hold else 0
    if missing:
        text = text.replace(b"null", NULL_SENTINEL)
    try:
        if width is None:
            return _restore_nulls(number_parser.active.flat(text, kind), missing)
        flat, rows = number_parser.active.rows(text, width)
    except DECLINED:
        return None
    if count_brackets(text) != rows + 1:
        return None  # a list within a row would be flattened
    return _restore_nulls(flat, missing)


def _restore_nulls(flat: NumberArray, missing: int) -> NumberArray | None:
    """Return the numbers with NaN in place of the sentinel; None if its count is not `missing`."""
    if not missing:
        return flat
    is_null = flat == float(NULL_SENTINEL)
    return np.where(is_null, np.nan, flat) if np.count_nonzero(is_null) == missing else None


def split_rows(text: bytes) -> list[bytes]:
    """Split a list between its rows into lists. Other text is split into pieces of which a parser declines one."""
    pieces, begin = [], 0
    while len(text) - begin > PARSE_BYTES:
        stop = text.find(b"]", begin + PARSE_BYTES)
        comma = text.find(b",", stop) if stop >= 0 else -1
        if comma < 0 or text[stop + 1 : comma].strip():
            break  # the rest is one piece, in which a parser locates the fault
        pieces.append((b"" if begin == 0 else b"[") + text[begin : stop + 1] + b"]")
        begin = comma + 1
    return [*pieces, (b"" if begin == 0 else b"[") + text[begin:]]


def split_nested(text: bytes) -> list[bytes]:
    """Split a flat or nested list at commas, and enclose each piece in the brackets that are open at its ends.

    All pieces are JSON if, and only if, the text is. Where that cannot be ensured, the last piece is empty.
    """
    pieces: list[bytes] = []
    begin = depth = 0
    while True:
        comma = text.find(b",", begin + PARSE_BYTES)
        piece, begin_depth = text[begin : comma if comma >= 0 else len(text)], depth
        depth += count_brackets(piece) - count_brackets(piece, b"]")
        stripped = piece.strip()
        if not stripped or stripped.startswith(b"]") or (depth < 1 or stripped.endswith(b"[") if comma >= 0 else depth):
            return [*pieces, b""]  # a comma without a value next to it, or after the list; or an unclosed list
        pieces.append(b"[" * begin_depth + piece + b"]" * depth)
        if comma < 0:
            return pieces
        begin = comma + 1
