"""The commonest body of `/v1/predict`, read in one pass; whatever is unusual in it is left to the schemas.

They parse twice, which lets them name the place of any fault: first what an instance is, then its numbers. A body of
rows of numbers and of names has no fault to be named, and is parsed here once, straight into an array; a long one is
cut between its instances, because a parser holds the interpreter until it is done.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import simdjson

from model import windows
from service.api.decode import Decoded
from service.api.flights import Flight
from service.api.numbers import PIECE, Unusual, brackets, flat_rows, parser, to_float32
from service.api.schemas import CONTROL, MOST_CYCLE, MOST_NAME
from service.runtime import Batch, Model

TELEMETRY, ENGINE, CYCLE = "telemetry", "engine_id", "cycle"
_BETWEEN = re.compile(rb"}[ \t\r\n]{0,256},(?=[ \t\r\n]{0,256}\{)")  # two instances, and no megabytes of blanks
_LAST = re.compile(rb"\][ \t\r\n]*}[ \t\r\n]*\Z")  # nothing follows the instances
_BEGIN, _END, _TAIL = b'{"instances":[', b"]}", 256


class Quick(NamedTuple):
    """The instances of a body: what they are called by, and their windows."""

    flights: list[Flight]
    decoded: Decoded


def read_quickly(body: bytes, model: Model, most: int, piece: int = PIECE) -> Quick | None:
    """A body of nothing but instances of rows of numbers, perhaps with engine and cycle; None if it is any other.

    Args:
        body: as it was sent.
        model: whose input they shall be.
        most: instances; more are left to the schemas, which say that they are too many.
        piece: bytes that are parsed at a time, twice as many at most.
    """
    window = model.manifest.window
    if window is None or body.startswith(BOM_UTF8):  # which this parser would read over
        return None
    flights: list[Flight] = []
    batches = []
    try:
        for part in _pieces(body, piece):
            some, batch = _instances(part, window, len(model.channels), most - len(flights))
            flights += some
            batches.append(batch)
    except (ValueError, TypeError, RuntimeError, KeyError):  # as the parser has it, and Unusual
        return None
    return Quick(flights, Decoded(batches[0] if len(batches) == 1 else np.concatenate(batches), None, None))


def _pieces(body: bytes, size: int) -> Iterator[bytes]:
    """A long body cut between its instances, each piece a body.

    Every piece is such a body if, and only if, the whole is: a cut through anything but the list of instances leaves a
    piece that has no end.

    Raises:
        Unusual: it cannot be cut.
    """
    if len(body) > size and not _LAST.search(body, max(0, len(body) - _TAIL)):
        raise Unusual  # before most of it is read for nothing
    begin, head = 0, b""
    while len(body) - begin > size:
        end = body.find(b"}", begin + size)
        if end < 0 or end - begin > 2 * size:
            raise Unusual
        between = _BETWEEN.match(body, end)
        if between is None:  # the last one, or another bracket
            break
        yield head + body[begin : end + 1] + _END
        begin, head = between.end(), _BEGIN
    if len(body) - begin > 2 * size:
        raise Unusual
    yield head + body[begin:] if begin else body


def _instances(body: bytes, window: int, width: int, most: int) -> tuple[list[Flight], Batch]:
    """What each instance is called by, and the newest window of its rows, (N, window, width).

    Raises:
        ValueError, TypeError, RuntimeError, KeyError: anything is unusual.
    """
    document: Any = parser().parse(body)
    if not isinstance(document, simdjson.Object) or list(document.keys()) != ["instances"]:
        raise Unusual
    instances = document["instances"]
    if not isinstance(instances, simdjson.Array) or not 0 < len(instances) <= most:
        raise Unusual
    flights, tables, lengths = [], [], []
    for instance in instances:
        if not isinstance(instance, simdjson.Object):
            raise Unusual
        names = list(instance.keys())
        flights.append(_NOBODY if names == [TELEMETRY] else _flight(instance, names))
        rows: Any = instance[TELEMETRY]
        tables.append(flat_rows(rows, width))
        lengths.append(len(rows))
    if brackets(body) != 1 + len(tables) + sum(lengths):  # a list within a row would be flattened without a word
        raise Unusual
    values = to_float32(tables[0] if len(tables) == 1 else np.concatenate(tables))
    if values is None:
        raise Unusual
    if set(lengths) == {window}:
        return flights, values.reshape(-1, window, width)
    histories = np.split(values.reshape(-1, width), np.cumsum(lengths)[:-1])
    return flights, np.stack([windows.pad_left(history, window) for history in histories])


def _flight(instance: simdjson.Object, names: list[str]) -> Flight:
    if len(set(names)) != len(names) or not {TELEMETRY, ENGINE, CYCLE}.issuperset(names):
        raise Unusual
    engine: Any = instance.get(ENGINE)
    cycle: Any = instance.get(CYCLE)
    named = engine is None or (isinstance(engine, str) and 0 < len(engine) <= MOST_NAME and not CONTROL.search(engine))
    dated = cycle is None or (type(cycle) is int and 0 <= cycle <= MOST_CYCLE)
    if not (named and dated):
        raise Unusual
    return Flight(engine, cycle)


_NOBODY = Flight(None, None)
