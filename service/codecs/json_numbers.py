"""Long and nested JSON lists of numbers to arrays, without a Python object per number; None for unusual text.

Long texts are parsed in pieces of 1 MiB: a parser holds the interpreter lock until it returns, and keeps buffers
for the longest text. Where the result is None, `diagnose` examines the values one by one.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import msgspec
import numpy as np

from service.codecs import number_parser
from service.codecs.number_parser import DECLINED, PARSE_BYTES, Floats, NumberArray, count_brackets, to_float32
from service.inference.onnx_model import Batch

MAX_ROW_BYTES = 4 * PARSE_BYTES  # no row of numbers is as long, and a parser keeps what it took for the longest text
NULL_SENTINEL = b" 1e300 "  # what stands for null while it is parsed: no float32, and part of no adjacent value


def parse_rows(text: bytes, width: int, hold: bool = False) -> Floats | None:
    """A list of rows of `width` numbers, (T, width); null as NaN if it may be held."""
    parts = []
    for piece in [text] if len(text) <= PARSE_BYTES else split_rows(text):
        part = _parse_piece(piece, "d", width, hold) if len(piece) <= MAX_ROW_BYTES else None
        if part is None:
            return None
        parts.append(part)
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return flat.reshape(-1, width)


def parse_joint_rows(texts: Sequence[bytes | memoryview], width: int) -> Sequence[Batch] | Batch | None:
    """Lists of rows of `width` numbers in one pass, each (T, width) in float32; None if anything is unusual in any.

    They are one array if each has as many rows.

    Each text begins and ends with a bracket, and may be wrong between. A zero behind each keeps them apart: what is not
    one list has it for a row, or in a row among lists, and is found out whatever its neighbours are.
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
    return [flat[at : at + width * length].reshape(-1, width) for at, length in zip(begins, lengths, strict=False)]


def parse_columns(text: bytes, names: tuple[str, ...], hold: bool = False) -> Floats | None:
    """An object of columns of equal length, (T, names) in the order of the names; null as NaN if it may be held."""
    try:
        found = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if found.keys() != set(names) or not names:
        return None
    texts = [bytes(found[name]) for name in names]
    values = [parse_numbers(text, "d", hold) if count_brackets(text) == 1 else None for text in texts]
    lengths = {0 if column is None else len(column) for column in values}
    return np.stack(values, axis=1) if len(lengths) == 1 and lengths != {0} else None  # type: ignore[arg-type]  # none is None


def parse_numbers(text: bytes, kind: Literal["d", "i"], hold: bool = False) -> NumberArray | None:
    """All numbers of a flat or nested list in their order, as float64 or int64; null as NaN if it may be held."""
    parts = []
    for piece in [text] if len(text) <= PARSE_BYTES else split_nested(text):
        part = _parse_piece(piece, kind, None, hold)
        if part is None:
            return None
        parts.append(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _parse_piece(text: bytes, kind: Literal["d", "i"], width: int | None, hold: bool) -> NumberArray | None:
    """The numbers of a list, of which every row must have `width` if that is given; None if it is no such list."""
    missing = text.count(b"null") if hold else 0
    if missing:
        text = text.replace(b"null", NULL_SENTINEL)
    try:
        if width is None:
            return _restore_nulls(number_parser.active.flat(text, kind), missing)
        flat, rows = number_parser.active.rows(text, width)
    except DECLINED:
        return None
    return (
        _restore_nulls(flat, missing) if count_brackets(text) == rows + 1 else None
    )  # a list within a row would be flattened


def _restore_nulls(flat: NumberArray, missing: int) -> NumberArray | None:
    """What stood for null as NaN; None if that is not what it was."""
    if not missing:
        return flat
    holes = flat == float(NULL_SENTINEL)
    return np.where(holes, np.nan, flat) if np.count_nonzero(holes) == missing else None


def split_rows(text: bytes) -> list[bytes]:
    """A list cut behind its rows, each piece a list; of anything else nonsense, as a parser finds."""
    found, begin = [], 0
    while len(text) - begin > PARSE_BYTES:
        stop = text.find(b"]", begin + PARSE_BYTES)
        comma = text.find(b",", stop) if stop >= 0 else -1
        if comma < 0 or text[stop + 1 : comma].strip():
            break  # whoever reads the rest as a whole finds what is wrong with it
        found.append((b"" if begin == 0 else b"[") + text[begin : stop + 1] + b"]")
        begin = comma + 1
    return [*found, (b"" if begin == 0 else b"[") + text[begin:]]


def split_nested(text: bytes) -> list[bytes]:
    """A list of numbers or of lists cut at its commas, each piece in as many brackets as were open there.

    Every piece is JSON if, and only if, the text is; of what cannot be told so, the last piece is not.
    """
    found: list[bytes] = []
    begin = depth = 0
    while True:
        comma = text.find(b",", begin + PARSE_BYTES)
        piece, opened = text[begin : comma if comma >= 0 else len(text)], depth
        depth += count_brackets(piece) - count_brackets(piece, b"]")
        ends = piece.strip()
        if not ends or ends.startswith(b"]") or (depth < 1 or ends.endswith(b"[") if comma >= 0 else depth):
            return [*found, b""]  # a comma beside which there is no value, or behind the list; or it never ends
        found.append(b"[" * opened + piece + b"]" * depth)
        if comma < 0:
            return found
        begin = comma + 1
