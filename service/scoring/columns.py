"""Parse Arrow columns: engine ids, cycles, readings and classes. Each parser also returns a mask of invalid values.

Works on whole columns. Only columns with texts that are not numbers need a regular expression.
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
NO_VALUE = ("", "na", "n/a", "null", "none", "nan")  # texts that mean a missing number, in upper or lower case
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?([iI][nN][fF]([iI][nN][iI][tT][yY])?)$"
Values = Any  # a pyarrow.Array


def normalise_type(values: Values) -> Values:
    """Decode dictionaries, and convert every kind of text to `string` and float16 to float64."""
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_float16(values.type):  # pyarrow supports few operations on float16
        return values.cast(pa.float64())
    text_types = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary)
    if not any(has_type(values.type) for has_type in text_types):
        return values
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decode_text(value) for value in values.to_pylist()], pa.string())


def _decode_text(value: bytes | None) -> str | None:
    """Decode UTF-8. Other bytes become a NUL, which is invalid as an engine id, a number and a class."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return "\0"


def parse_numbers(values: Values) -> tuple[Floats, Mask]:
    """Return numbers (N,), NaN where there is none, and a mask of values that are not numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = normalise_type(values)
    all_valid = np.zeros(len(values), dtype=np.bool_)
    if pa.types.is_string(values.type):
        try:
            return _to_floats(pc.cast(values, pa.float64())), all_valid
        except pa.ArrowInvalid:
            return _parse_texts(values)
    numeric_types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if not any(has_type(values.type) for has_type in numeric_types):
        return np.full(len(values), np.nan), np.asarray(values.is_valid().to_numpy(zero_copy_only=False))
    return _to_floats(pc.cast(values, pa.float64(), safe=False)), all_valid


def _parse_texts(values: Values) -> tuple[Floats, Mask]:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.utf8_trim_whitespace(values)
    missing = pc.is_in(pc.utf8_lower(values), pa.array(NO_VALUE))
    values = pc.if_else(missing, pa.scalar(None, pa.string()), values)
    numeric = pc.fill_null(pc.match_substring_regex(values, NUMBER), True)
    numbers = pc.cast(pc.if_else(numeric, values, pa.scalar(None, pa.string())), pa.float64())
    return _to_floats(numbers), ~np.asarray(numeric.to_numpy(zero_copy_only=False), dtype=np.bool_)


def _to_floats(values: Values) -> Floats:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def parse_engine_ids(values: Values) -> tuple[Values, Mask]:
    """Return engine ids as texts, and a mask of ids that are missing, too long or have control characters.

    The number 7.0 becomes `7`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = normalise_type(values)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
        integral = pc.and_(pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), float(MAX_CYCLE)))
        digits = pc.cast(pc.cast(pc.if_else(integral, values, pa.scalar(None, values.type)), pa.int64()), pa.string())
        values = pc.if_else(integral, digits, pc.cast(values, pa.string()))
    try:
        texts = pc.cast(values, pa.string())
    except pa.ArrowException:  # lists, for example, have no text
        return pa.nulls(len(values), pa.string()), np.ones(len(values), dtype=np.bool_)
    length = pc.fill_null(pc.utf8_length(texts), 0).to_numpy(zero_copy_only=False)
    wrong_length = (length < 1) | (length > MAX_NAME_LENGTH)
    control = pc.fill_null(pc.match_substring_regex(texts, CONTROL_CHARACTER.pattern), False).to_numpy(
        zero_copy_only=False
    )
    return texts, np.asarray(wrong_length | control, dtype=np.bool_)


def parse_cycles(values: Values) -> tuple[Integers, Mask]:
    """Return cycles (N,), and a mask of values that are not integers from 0 to `MAX_CYCLE`."""
    cycles, invalid = parse_numbers(values)
    invalid = invalid | ~((cycles >= 0) & (cycles <= MAX_CYCLE) & (cycles == np.floor(cycles)))
    for i in np.flatnonzero(cycles == MAX_CYCLE).tolist():  # the next larger integer has the same float64
        invalid[i] = Decimal(str(values[i].as_py())) != MAX_CYCLE
    return np.where(invalid, 0, cycles).astype(np.int64), invalid


def parse_readings(columns: list[Values]) -> tuple[npt.NDArray[np.float32], list[Mask]]:
    """Return readings (N, C) as float32 and, for each column, a mask of values that are not numbers.

    A missing value is NaN, and a value beyond float32 is infinite.
    """
    readings = np.empty((len(columns[0]) if columns else 0, len(columns)), dtype=np.float32)
    not_numeric = []
    for k, column in enumerate(columns):
        values, invalid = parse_numbers(column)
        with np.errstate(over="ignore"):
            readings[:, k] = values
        not_numeric.append(invalid)
    return readings, not_numeric


def parse_classes(values: Values, classes: tuple[str, ...]) -> tuple[Integers, Mask]:
    """Return class indices (N,) of names or indices, -1 where the value is missing, and a mask of invalid values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = normalise_type(values)
    numbers, invalid = parse_numbers(values)
    present = ~np.isnan(numbers)
    invalid = invalid | (present & ~((numbers >= 0) & (numbers < len(classes)) & (numbers == np.floor(numbers))))
    index = np.where(present & ~invalid, numbers, -1).astype(np.int64)
    if not pa.types.is_string(values.type):
        return index, invalid
    by_name = pc.index_in(pc.utf8_trim_whitespace(values), pa.array(classes)).fill_null(-1)
    index_by_name = by_name.to_numpy(zero_copy_only=False)
    return np.where(index_by_name < 0, index, index_by_name).astype(np.int64), (index_by_name < 0) & invalid


def parse_rul_classes(values: Values, classify: Callable[[Floats], Integers]) -> tuple[Integers, Mask]:
    """Return class indices (N,) of true RUL in cycles, -1 where it is missing, and a mask of invalid values."""
    rul, invalid = parse_numbers(values)
    present = ~np.isnan(rul)
    invalid = invalid | (present & ~((rul >= 0) & np.isfinite(rul)))
    index = np.where(present & ~invalid, classify(np.where(present, rul, 0.0)), -1)
    return index.astype(np.int64), invalid
