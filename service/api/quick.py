"""The commonest body of `/v1/predict`, read in one pass; whatever is unusual in it is left to the schemas.

They parse twice, which lets them name the place of any fault: first what an instance is, then its numbers. A body of
rows of numbers and of names has no fault to be named, and is parsed here once, straight into an array.
"""

from codecs import BOM_UTF8
from typing import Any, NamedTuple

import numpy as np
import simdjson

from model import windows
from service.api.decode import Decoded
from service.api.depth import brackets
from service.api.flights import Flight
from service.api.held import Sent
from service.api.numbers import PIECE, Unusual, flat_rows, parser, to_float32
from service.api.schemas import CONTROL, MOST_CYCLE, MOST_NAME
from service.runtime import Batch, Model

TELEMETRY, ENGINE, CYCLE = "telemetry", "engine_id", "cycle"


class Quick(NamedTuple):
    """The instances of a body: what they are called by, and their windows."""

    flights: list[Flight]
    decoded: Decoded


def read_quickly(body: Sent, model: Model, most: int) -> Quick | None:
    """A body of nothing but instances of rows of numbers, perhaps with engine and cycle; None if it is any other."""
    window = model.manifest.window
    if window is None or len(body) > PIECE or not isinstance(body, bytes):
        return None
    if body.startswith(BOM_UTF8):  # which this parser would read over
        return None
    try:
        flights, batch = _instances(body, window, len(model.channels), most)
    except (ValueError, TypeError, RuntimeError, KeyError):  # as the parser has it, and Unusual
        return None
    return Quick(flights, Decoded(batch, None, None))


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
