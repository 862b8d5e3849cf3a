"""Parse JSON lists of numbers into arrays: with simdjson where it is installed, otherwise with msgspec and orjson.

Both parsers return equal values, and decline (raise one of `DECLINED`) what is not a list of numbers. simdjson has no
wheel for Python 3.14, and is about 4 times as fast. No other module of the service imports it.
"""

import re
import threading
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from model.numerics import Floats

NumberArray = npt.NDArray[Any]
DTYPES: dict[str, type[np.generic]] = {"d": np.float64, "i": np.int64}
_INSTANCE_KEYS = {"telemetry", "engine_id", "cycle", "label"}
_NO_KEYS = (None, None, None)
DECLINED = (ValueError, TypeError, RuntimeError, KeyError, OverflowError, msgspec.MsgspecError)
PARSE_BYTES = 1 << 20  # bytes parsed at a time; 1 to 2 ms
FLOAT32_LIMIT = float(np.finfo(np.float32).max) + 2.0**103  # smaller values are rounded to the largest float32
BLAS_SINGLE_THREAD_MAX = 8192  # numbers; BLAS sums more in several threads, and these may find no free core
SHORT_TEXT_BYTES = 1 << 12  # bytes up to which `bytes.count` is the fastest way to count


class UnusualJson(ValueError):
    """JSON that a slower parser has to examine."""


class ParsedInstances(NamedTuple):
    """Instances of a body: engine, cycle and label of each, not validated, its numbers and its number of rows."""

    keys: list[tuple[Any, Any, Any]]
    numbers: list[Floats]
    lengths: list[int]


class NumberParser(Protocol):
    """Parse JSON text. Each method raises one of `DECLINED` for text of another form.

    A list within a row may be flattened; the caller compares the number of brackets with the number of rows.
    """

    def rows(self, text: bytes, width: int) -> tuple[Floats, int]:
        """Parse a list of rows of `width` numbers each: all numbers in order, and the number of rows."""
        ...

    def tables(self, text: bytes, width: int) -> tuple[Floats, list[int]]:
        """Parse `[rows, 0, rows, 0, ...]`: all numbers in order with the zeros, and the number of rows of each."""
        ...

    def flat(self, text: bytes, kind: Literal["d", "i"]) -> NumberArray:
        """Parse a flat or nested list: all numbers in order as float64 ("d") or int64 ("i")."""
        ...

    def instances(self, text: bytes, width: int) -> ParsedInstances:
        """Parse a list of objects: `telemetry` as rows of `width` numbers, perhaps other keys of `ParsedInstances`."""
        ...


class SimdjsonParser:
    """Write the numbers directly into buffers. Each thread has one parser, whose buffers are reused."""

    def __init__(self) -> None:
        import simdjson

        class ThreadParser(threading.local):
            """One parser per thread."""

            def __init__(self) -> None:
                self.parse = simdjson.Parser().parse

        self._array, self._object = simdjson.Array, simdjson.Object
        self._thread = ThreadParser()

    def rows(self, text: bytes, width: int) -> tuple[Floats, int]:
        """Implement `NumberParser`."""
        rows: Any = self._thread.parse(text)
        length = self._length(rows, width)
        return np.frombuffer(rows.as_buffer(of_type="d"), np.float64), length

    def tables(self, text: bytes, width: int) -> tuple[Floats, list[int]]:
        """Implement `NumberParser`."""
        values: Any = self._thread.parse(text)
        elements = iter(values)
        lengths = [self._length(rows, width) for rows, zero in zip(elements, elements, strict=True) if zero == 0]
        if len(values) != 2 * len(lengths):
            raise UnusualJson
        return np.frombuffer(values.as_buffer(of_type="d"), np.float64), lengths

    def flat(self, text: bytes, kind: Literal["d", "i"]) -> NumberArray:
        """Implement `NumberParser`."""
        values: Any = self._thread.parse(text)
        if not isinstance(values, self._array):
            raise UnusualJson
        return np.frombuffer(values.as_buffer(of_type=kind), DTYPES[kind])

    def instances(self, text: bytes, width: int) -> ParsedInstances:
        """Implement `NumberParser`."""
        parsed = ParsedInstances([], [], [])
        instances: Any = self._thread.parse(text)
        for instance in instances:
            if not isinstance(instance, self._object):
                raise UnusualJson
            names = list(instance.keys())
            if names == ["telemetry"]:
                parsed.keys.append(_NO_KEYS)
            elif len(set(names)) == len(names) and _INSTANCE_KEYS.issuperset(names):
                parsed.keys.append((instance.get("engine_id"), instance.get("cycle"), instance.get("label")))
            else:
                raise UnusualJson
            rows: Any = instance["telemetry"]
            if not isinstance(rows, self._array) or set(map(len, rows)) != {width}:  # type: ignore[arg-type]  # as in `_length`
                raise UnusualJson
            parsed.lengths.append(len(rows))
            parsed.numbers.append(np.frombuffer(rows.as_buffer(of_type="d"), np.float64))
        return parsed

    def _length(self, rows: Any, width: int) -> int:
        if not isinstance(rows, self._array) or set(map(len, rows)) != {width}:  # type: ignore[arg-type]  # a number has no length, which is a TypeError
            raise UnusualJson
        return len(rows)


class _Instance(msgspec.Struct, forbid_unknown_fields=True):
    telemetry: list[list[float]]
    engine_id: Any = None
    cycle: Any = None
    label: Any = None


class PortableParser:
    """Parse to lists of Python floats, then to arrays."""

    _rows = msgspec.json.Decoder(list[list[float]])
    _tables = msgspec.json.Decoder(list[list[list[float]] | float])
    _instances = msgspec.json.Decoder(list[_Instance])

    def rows(self, text: bytes, width: int) -> tuple[Floats, int]:
        """Implement `NumberParser`."""
        rows = self._rows.decode(text)
        return _check_integers(text, _row_numbers(rows, width)), len(rows)

    def tables(self, text: bytes, width: int) -> tuple[Floats, list[int]]:
        """Implement `NumberParser`."""
        values: Any = self._tables.decode(text)
        tables, zeros = values[::2], values[1::2]
        if set(map(type, tables)) != {list} or zeros != [0.0] * len(tables):
            raise UnusualJson
        parts = [part for table in tables for part in (_row_numbers(table, width), np.zeros(1))]
        return _check_integers(text, np.concatenate(parts)), list(map(len, tables))

    def flat(self, text: bytes, kind: Literal["d", "i"]) -> NumberArray:
        """Implement `NumberParser`."""
        elements: Any = orjson.loads(text)
        if not isinstance(elements, list):
            raise UnusualJson
        values = _flatten(elements) if list in map(type, elements) else elements
        if not set(map(type, values)) <= ({int, float} if kind == "d" else {int}):
            raise UnusualJson
        return _check_integers(text, np.array(values, DTYPES[kind]))

    def instances(self, text: bytes, width: int) -> ParsedInstances:
        """Implement `NumberParser`."""
        instances = self._instances.decode(text)
        numbers = [_row_numbers(instance.telemetry, width) for instance in instances]
        for values in numbers:
            _check_integers(text, values)
        keys = [(instance.engine_id, instance.cycle, instance.label) for instance in instances]
        key_numbers = [float(key) for triple in keys for key in triple if isinstance(key, int | float)]
        _check_integers(text, np.array(key_numbers))
        return ParsedInstances(keys, numbers, [len(instance.telemetry) for instance in instances])


def _row_numbers(rows: list[list[float]], width: int) -> Floats:
    if set(map(len, rows)) != {width}:
        raise UnusualJson
    return np.fromiter(chain.from_iterable(rows), np.float64, len(rows) * width)


def _flatten(values: list[Any]) -> list[Any]:
    """Return all elements of nested lists in order; without recursion, as the parser accepts 1024 levels."""
    flat: list[Any] = []
    open_lists = [iter(values)]
    while open_lists:
        for value in open_lists[-1]:
            if type(value) is list:
                open_lists.append(iter(value))
                break
            flat.append(value)
        else:
            open_lists.pop()
    return flat


_LONG_INTEGERS = re.compile(rb"(?<![0-9.eE+-])-?[0-9]{19,}(?![0-9.eE])")


def _check_integers(text: bytes, values: NumberArray) -> NumberArray:
    """Decline integers that 64 bits do not hold, as simdjson does; msgspec and orjson return floats for them."""
    if (values.size and not -(2.0**63) < values.min() <= values.max() < 2.0**64) and not all(
        -(2**63) <= int(digits) < 2**64 for digits in _LONG_INTEGERS.findall(text)
    ):
        raise UnusualJson
    return values


def to_float32(values: NumberArray, missing: bool = False) -> npt.NDArray[np.float32] | None:
    """Return the values as float32; None if one is not finite in float32, as 1e39.

    `missing`: whether NaN is accepted as a missing value.
    """
    flat = values.ravel()
    # the sum of squares is the cheapest check of all values; only if it fails they are compared one by one
    with np.errstate(over="ignore", invalid="ignore"):
        small = (flat.dot(flat) if len(flat) <= BLAS_SINGLE_THREAD_MAX else _sum_of_squares(flat)) < FLOAT32_LIMIT
    if not small:
        fits = np.abs(flat) < FLOAT32_LIMIT  # False for NaN
        if not (fits | np.isnan(flat) if missing else fits).all():
            return None
    return values.astype(np.float32)


def _sum_of_squares(flat: NumberArray) -> float:
    if len(flat) <= BLAS_SINGLE_THREAD_MAX:
        return flat.dot(flat)  # type: ignore[no-any-return]  # numpy's product is Any
    return sum(
        _sum_of_squares(flat[begin : begin + BLAS_SINGLE_THREAD_MAX])
        for begin in range(0, len(flat), BLAS_SINGLE_THREAD_MAX)
    )


def fits_float32(value: float) -> bool:
    """Return whether a number, an integer of any size included, is finite as float32."""
    return -FLOAT32_LIMIT < value < FLOAT32_LIMIT


def count_brackets(text: bytes | memoryview, bracket: bytes = b"[") -> int:
    """Count the brackets of one kind. A long text is counted without the interpreter lock."""
    if len(text) <= SHORT_TEXT_BYTES:
        return bytes(text).count(bracket)
    values, code = np.frombuffer(text, np.uint8), ord(bracket)
    if len(values) <= PARSE_BYTES:
        return int(np.count_nonzero(values == code))
    steps = range(0, len(values), PARSE_BYTES)
    return sum(int(np.count_nonzero(values[begin : begin + PARSE_BYTES] == code)) for begin in steps)


def _choose_parser() -> NumberParser:
    try:
        return SimdjsonParser()
    except ImportError:
        return PortableParser()


active = _choose_parser()
