"""Parse JSON lists of numbers into arrays: with simdjson where it is installed, otherwise with msgspec and orjson.

Both parsers return equal values, and decline (raise one of `DECLINED`) what is not a list of numbers. simdjson has no
wheel for Python 3.14, and is about 4 times as fast. Nothing else of the service imports it.
"""

import re
import threading
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

Flat = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
DTYPES: dict[str, type[np.generic]] = {"d": np.float64, "i": np.int64}
_NAMES = {"telemetry", "engine_id", "cycle", "label"}
_NO_KEYS = (None, None, None)
DECLINED = (ValueError, TypeError, RuntimeError, KeyError, OverflowError, msgspec.MsgspecError)


class Unusual(ValueError):
    """JSON that a slower reader has to examine."""


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

    def flat(self, text: bytes, kind: Literal["d", "i"]) -> Flat:
        """Parse a flat or nested list: all numbers in order as float64 ("d") or int64 ("i")."""
        ...

    def instances(self, text: bytes, width: int) -> ParsedInstances:
        """Parse a list of objects: `telemetry` as rows of `width` numbers, perhaps other keys of `ParsedInstances`."""
        ...


class SimdjsonParser:
    """Write the numbers straight into buffers. Each thread keeps one parser, whose buffers are reused."""

    def __init__(self) -> None:
        import simdjson

        self._new, self._array, self._object = simdjson.Parser, simdjson.Array, simdjson.Object
        self._threads = threading.local()

    def rows(self, text: bytes, width: int) -> tuple[Floats, int]:
        """As `NumberParser`."""
        rows: Any = self._parse(text)
        length = self._length(rows, width)
        return np.frombuffer(rows.as_buffer(of_type="d"), np.float64), length

    def tables(self, text: bytes, width: int) -> tuple[Floats, list[int]]:
        """As `NumberParser`."""
        found: Any = self._parse(text)
        values = iter(found)
        lengths = [self._length(value, width) for value, zero in zip(values, values, strict=True) if zero == 0]
        if len(found) != 2 * len(lengths):
            raise Unusual
        return np.frombuffer(found.as_buffer(of_type="d"), np.float64), lengths

    def flat(self, text: bytes, kind: Literal["d", "i"]) -> Flat:
        """As `NumberParser`."""
        found: Any = self._parse(text)
        if not isinstance(found, self._array):
            raise Unusual
        return np.frombuffer(found.as_buffer(of_type=kind), DTYPES[kind])

    def instances(self, text: bytes, width: int) -> ParsedInstances:
        """As `NumberParser`."""
        found: Any = self._parse(text)
        parsed = ParsedInstances([], [], [])
        for instance in found:
            if not isinstance(instance, self._object):
                raise Unusual
            names = list(instance.keys())
            if names == ["telemetry"]:
                parsed.keys.append(_NO_KEYS)
            elif len(set(names)) == len(names) and _NAMES.issuperset(names):
                parsed.keys.append((instance.get("engine_id"), instance.get("cycle"), instance.get("label")))
            else:
                raise Unusual
            rows: Any = instance["telemetry"]
            parsed.lengths.append(self._length(rows, width))
            parsed.numbers.append(np.frombuffer(rows.as_buffer(of_type="d"), np.float64))
        return parsed

    def _parse(self, text: bytes) -> Any:
        try:
            parser = self._threads.parser
        except AttributeError:
            parser = self._threads.parser = self._new()
        return parser.parse(text)

    def _length(self, rows: Any, width: int) -> int:
        if not isinstance(rows, self._array) or set(map(len, rows)) != {width}:  # type: ignore[arg-type]  # a number has no length, which is a TypeError
            raise Unusual
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
        """As `NumberParser`."""
        rows = self._rows.decode(text)
        return _checked(text, _joined(rows, width)), len(rows)

    def tables(self, text: bytes, width: int) -> tuple[Floats, list[int]]:
        """As `NumberParser`."""
        found: Any = self._tables.decode(text)
        tables, zeros = found[::2], found[1::2]
        if set(map(type, tables)) != {list} or zeros != [0.0] * len(tables):
            raise Unusual
        parts = [part for table in tables for part in (_joined(table, width), np.zeros(1))]
        return _checked(text, np.concatenate(parts)), list(map(len, tables))

    def flat(self, text: bytes, kind: Literal["d", "i"]) -> Flat:
        """As `NumberParser`."""
        found: Any = orjson.loads(text)
        if not isinstance(found, list):
            raise Unusual
        values = _flattened(found) if list in map(type, found) else found
        if not set(map(type, values)) <= ({int, float} if kind == "d" else {int}):
            raise Unusual
        return _checked(text, np.array(values, DTYPES[kind]))

    def instances(self, text: bytes, width: int) -> ParsedInstances:
        """As `NumberParser`."""
        found = self._instances.decode(text)
        numbers = [_joined(instance.telemetry, width) for instance in found]
        for values in numbers:
            _checked(text, values)
        keys = [(instance.engine_id, instance.cycle, instance.label) for instance in found]
        others = [float(key) for triple in keys for key in triple if isinstance(key, int | float)]
        _checked(text, np.array(others))
        return ParsedInstances(keys, numbers, [len(instance.telemetry) for instance in found])


def _joined(rows: list[list[float]], width: int) -> Floats:
    if set(map(len, rows)) != {width}:
        raise Unusual
    return np.fromiter(chain.from_iterable(rows), np.float64, len(rows) * width)


def _flattened(values: list[Any]) -> list[Any]:
    """Return all elements of nested lists in order; without recursion, as the parser accepts 1024 levels."""
    found: list[Any] = []
    open_lists = [iter(values)]
    while open_lists:
        for value in open_lists[-1]:
            if type(value) is list:
                open_lists.append(iter(value))
                break
            found.append(value)
        else:
            open_lists.pop()
    return found


_INTEGERS = re.compile(rb"(?<![0-9.eE+-])-?[0-9]{19,}(?![0-9.eE])")


def _checked(text: bytes, values: Flat) -> Flat:
    """Decline integers that 64 bits do not hold, as simdjson does; msgspec and orjson return floats for them."""
    if (values.size and not -(2.0**63) < values.min() <= values.max() < 2.0**64) and not all(
        -(2**63) <= int(digits) < 2**64 for digits in _INTEGERS.findall(text)
    ):
        raise Unusual
    return values


def _installed() -> NumberParser:
    try:
        return SimdjsonParser()
    except ImportError:
        return PortableParser()


active = _installed()
