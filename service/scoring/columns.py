"""Arrow values to what is scored: names, whole numbers, readings, classes. Masks tell which ones are wrong.

Works on whole columns; texts that are no numbers cost a regular expression, and only then.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from service.codecs.requests import CONTROL_CHARACTER, MAX_CYCLE, MAX_NAME_LENGTH

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
NO_VALUE = ("", "na", "n/a", "null", "none", "nan")  # texts that stand for a missing number, in any case
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?([iI][nN][fF]([iI][nN][iI][tT][yY])?)$"
Values = Any  # a pyarrow.Array


def plain(values: Values) -> Values:
    """Without a dictionary, texts as `string`, bytes that are no UTF-8 as no text that fits, halves as doubles."""
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_float16(values.type):  # which pyarrow hardly computes with
        return values.cast(pa.float64())
    others = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary)
    if not any(is_such(values.type) for is_such in others):
        return values
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([_text(value) for value in values.to_pylist()], pa.string())


def _text(value: bytes | None) -> str | None:
    """Bytes as a text; with a NUL, which no name, number or class has, where they are none."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return "\0"


def numbers(values: Values) -> tuple[Floats, Mask]:
    """Numbers (N,), NaN where there is none, and which values are no number at all."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = plain(values)
    nothing = np.zeros(len(values), dtype=np.bool_)
    if pa.types.is_string(values.type):
        try:
            return _floats(pc.cast(values, pa.float64())), nothing
        except pa.ArrowInvalid:
            return _from_texts(values)
    usual = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if not any(is_such(values.type) for is_such in usual):
        return np.full(len(values), np.nan), np.asarray(values.is_valid().to_numpy(zero_copy_only=False))
    return _floats(pc.cast(values, pa.float64(), safe=False)), nothing


def _from_texts(values: Values) -> tuple[Floats, Mask]:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.utf8_trim_whitespace(values)
    missing = pc.is_in(pc.utf8_lower(values), pa.array(NO_VALUE))
    values = pc.if_else(missing, pa.scalar(None, pa.string()), values)
    fits = pc.fill_null(pc.match_substring_regex(values, NUMBER), True)
    kept = pc.if_else(fits, values, pa.scalar(None, pa.string()))
    return _floats(pc.cast(kept, pa.float64())), ~np.asarray(fits.to_numpy(zero_copy_only=False), dtype=np.bool_)


def _floats(values: Values) -> Floats:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def names(values: Values) -> tuple[Values, Mask]:
    """Ids of engines as texts, and which are none: missing, too long, with control characters; 7.0 is `7`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = plain(values)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
        whole = pc.and_(pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), float(MAX_CYCLE)))
        digits = pc.cast(pc.cast(pc.if_else(whole, values, pa.scalar(None, values.type)), pa.int64()), pa.string())
        values = pc.if_else(whole, digits, pc.cast(values, pa.string()))
    try:
        texts = pc.cast(values, pa.string())
    except pa.ArrowException:  # lists and the like
        return pa.nulls(len(values), pa.string()), np.ones(len(values), dtype=np.bool_)
    length = pc.fill_null(pc.utf8_length(texts), 0).to_numpy(zero_copy_only=False)
    wrong = (length < 1) | (length > MAX_NAME_LENGTH)
    control = pc.fill_null(pc.match_substring_regex(texts, CONTROL_CHARACTER.pattern), False).to_numpy(
        zero_copy_only=False
    )
    return texts, np.asarray(wrong | control, dtype=np.bool_)


def cycles(values: Values) -> tuple[Integers, Mask]:
    """Cycles (N,), and which are no whole number from 0 to the largest."""
    found, wrong = numbers(values)
    wrong = wrong | ~((found >= 0) & (found <= MAX_CYCLE) & (found == np.floor(found)))
    for i in np.flatnonzero(found == MAX_CYCLE).tolist():  # as which a float also has the next whole number
        wrong[i] = Decimal(str(values[i].as_py())) != MAX_CYCLE
    return np.where(wrong, 0, found).astype(np.int64), wrong


def readings(columns: list[Values]) -> tuple[npt.NDArray[np.float32], list[Mask]]:
    """Readings (N, C) as float32, NaN where there is none, infinite where one is too large; and what is no number."""
    found = np.empty((len(columns[0]) if columns else 0, len(columns)), dtype=np.float32)
    wrong = []
    for k, column in enumerate(columns):
        values, bad = numbers(column)
        with np.errstate(over="ignore"):
            found[:, k] = values
        wrong.append(bad)
    return found, wrong


def classes(values: Values, known: tuple[str, ...]) -> tuple[Integers, Mask]:
    """Indices of classes (N,) from names or indices, -1 where there is none, and which are neither."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = plain(values)
    found, wrong = numbers(values)
    given = ~np.isnan(found)
    wrong = wrong | (given & ~((found >= 0) & (found < len(known)) & (found == np.floor(found))))
    place = np.where(given & ~wrong, found, -1).astype(np.int64)
    if not pa.types.is_string(values.type):
        return place, wrong
    named = pc.index_in(pc.utf8_trim_whitespace(values), pa.array(known)).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where(named < 0, place, named).astype(np.int64), (named < 0) & wrong


def classes_of_rul(values: Values, classify: Callable[[Floats], Integers]) -> tuple[Integers, Mask]:
    """Indices of classes (N,) from true RUL in cycles, -1 where it is missing, and which are no RUL."""
    found, wrong = numbers(values)
    known = ~np.isnan(found)
    wrong = wrong | (known & ~((found >= 0) & np.isfinite(found)))
    place = np.where(known & ~wrong, classify(np.where(known, found, 0.0)), -1)
    return place.astype(np.int64), wrong
