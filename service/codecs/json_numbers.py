"""Numbers of JSON straight into arrays, no Python object for each; None where anything is unusual. Knows no schemas.

Long texts are parsed in pieces of 1 MiB: a parser holds the interpreter until it is done, and keeps buffers for the
longest text that it parsed. Where the result is None, the caller examines the values one by one to locate the fault.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import msgspec
import numpy as np

from service.codecs import number_parser
from service.codecs.number_parser import DECLINED, Flat, Floats
from service.inference.model_loader import Batch

PIECE = 1 << 20  # bytes parsed at a time; a millisecond or two
LONG_ROW = 4 * PIECE  # no row of numbers is as long, and a parser keeps what it took for the longest text
FLOAT32_MOST = float(np.finfo(np.float32).max) + 2.0**103  # less than this is rounded to the largest float32
FEW = 8192  # numbers that BLAS adds up in this thread: of more, others have a part, and may find no core free
MISSING = b" 1e300 "  # what stands for null while it is parsed: no float32, and part of no adjacent value
SHORT = 1 << 12  # bytes in which `bytes.count` is the fastest way to count


def table(text: bytes, width: int, hold: bool = False) -> Floats | None:
    """A list of rows of `width` numbers, (T, width); null as NaN if it may be held."""
    parts = []
    for piece in [text] if len(text) <= PIECE else pieces(text):
        part = _flat(piece, "d", width, hold) if len(piece) <= LONG_ROW else None
        if part is None:
            return None
        parts.append(part)
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return flat.reshape(-1, width)


def tables(texts: Sequence[bytes | memoryview], width: int) -> Sequence[Batch] | Batch | None:
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
    if len(lengths) != len(texts) or brackets(text) != 1 + len(texts) + sum(lengths):
        return None  # a list within a row would be flattened
    flat = to_float32(doubles)
    if flat is None:
        return None
    if len(set(lengths)) == 1:
        return flat.reshape(len(texts), -1)[:, :-1].reshape(len(texts), -1, width)  # without the zeros
    begins = accumulate((1 + width * length for length in lengths), initial=0)
    return [flat[at : at + width * length].reshape(-1, width) for at, length in zip(begins, lengths, strict=False)]


def columns(text: bytes, names: tuple[str, ...], hold: bool = False) -> Floats | None:
    """An object of columns of equal length, (T, names) in the order of the names; null as NaN if it may be held."""
    try:
        found = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if found.keys() != set(names) or not names:
        return None
    texts = [bytes(found[name]) for name in names]
    values = [numbers(text, "d", hold) if brackets(text) == 1 else None for text in texts]
    lengths = {0 if column is None else len(column) for column in values}
    return np.stack(values, axis=1) if len(lengths) == 1 and lengths != {0} else None  # type: ignore[arg-type]  # none is None


def numbers(text: bytes, kind: Literal["d", "i"], hold: bool = False) -> Flat | None:
    """All numbers of a flat or nested list in their order, as float64 or int64; null as NaN if it may be held."""
    parts = []
    for piece in [text] if len(text) <= PIECE else nested_pieces(text):
        part = _flat(piece, kind, None, hold)
        if part is None:
            return None
        parts.append(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _flat(text: bytes, kind: Literal["d", "i"], width: int | None, hold: bool) -> Flat | None:
    """The numbers of a list, of which every row must have `width` if that is given; None if it is no such list."""
    missing = text.count(b"null") if hold else 0
    if missing:
        text = text.replace(b"null", MISSING)
    try:
        if width is None:
            return _held(number_parser.active.flat(text, kind), missing)
        flat, rows = number_parser.active.rows(text, width)
    except DECLINED:
        return None
    return _held(flat, missing) if brackets(text) == rows + 1 else None  # a list within a row would be flattened


def _held(flat: Flat, missing: int) -> Flat | None:
    """What stood for null as NaN; None if that is not what it was."""
    if not missing:
        return flat
    holes = flat == float(MISSING)
    return np.where(holes, np.nan, flat) if np.count_nonzero(holes) == missing else None


def pieces(text: bytes) -> list[bytes]:
    """A list cut behind its rows, each piece a list; of anything else nonsense, as a parser finds."""
    found, begin = [], 0
    while len(text) - begin > PIECE:
        stop = text.find(b"]", begin + PIECE)
        comma = text.find(b",", stop) if stop >= 0 else -1
        if comma < 0 or text[stop + 1 : comma].strip():
            break  # whoever reads the rest as a whole finds what is wrong with it
        found.append((b"" if begin == 0 else b"[") + text[begin : stop + 1] + b"]")
        begin = comma + 1
    return [*found, (b"" if begin == 0 else b"[") + text[begin:]]


def nested_pieces(text: bytes) -> list[bytes]:
    """A list of numbers or of lists cut at its commas, each piece in as many brackets as were open there.

    Every piece is JSON if, and only if, the text is; of what cannot be told so, the last piece is not.
    """
    found: list[bytes] = []
    begin = depth = 0
    while True:
        comma = text.find(b",", begin + PIECE)
        piece, opened = text[begin : comma if comma >= 0 else len(text)], depth
        depth += brackets(piece) - brackets(piece, b"]")
        ends = piece.strip()
        if not ends or ends.startswith(b"]") or (depth < 1 or ends.endswith(b"[") if comma >= 0 else depth):
            return [*found, b""]  # a comma beside which there is no value, or behind the list; or it never ends
        found.append(b"[" * opened + piece + b"]" * depth)
        if comma < 0:
            return found
        begin = comma + 1


def to_float32(values: Flat, missing: bool = False) -> Batch | None:
    """Values in float32, or None if one is not finite there: 1e39 passes every JSON parser and is infinite here.

    `missing`: NaN stands for a value that is not there, and may.
    """
    flat = values.ravel()
    # the sum of squares is the cheapest look at all of them; only a suspicious one is followed by a second
    with np.errstate(over="ignore", invalid="ignore"):
        small = (flat.dot(flat) if len(flat) <= FEW else _squares(flat)) < FLOAT32_MOST
    if not small:
        fits = np.abs(flat) < FLOAT32_MOST  # not so where one is NaN
        if not (fits | np.isnan(flat) if missing else fits).all():
            return None
    return values.astype(np.float32)


def _squares(flat: Flat) -> float:
    if len(flat) <= FEW:
        return flat.dot(flat)  # type: ignore[no-any-return]  # numpy's product is Any
    return sum(_squares(flat[begin : begin + FEW]) for begin in range(0, len(flat), FEW))


def fits_float32(value: float) -> bool:
    """Whether a number, however large an integer, is finite after the cast to float32."""
    return -FLOAT32_MOST < value < FLOAT32_MOST


def brackets(text: bytes | memoryview, one: bytes = b"[") -> int:
    """Count the brackets of a kind. A long text is counted without holding the interpreter."""
    if len(text) <= SHORT:
        return bytes(text).count(one)
    values, code = np.frombuffer(text, np.uint8), ord(one)
    if len(values) <= PIECE:
        return int(np.count_nonzero(values == code))
    steps = range(0, len(values), PIECE)
    return sum(int(np.count_nonzero(values[begin : begin + PIECE] == code)) for begin in steps)
