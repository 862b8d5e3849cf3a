"""The commonest body of `/v1/predict`, parsed once; whatever is unusual in it is left to the schemas.

The schemas parse twice, which locates any fault: first the instances, then their numbers. A body of plain instances
(rows of numbers, perhaps an engine, a cycle and a class as label) has no fault to locate, and is parsed here straight
into arrays. A large one is parsed a few instances at a time. Wherever a list is split, it is JSON if each part is JSON
as a list.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from model import windows
from service.codecs import number_parser
from service.codecs.arrow_instances import Flight
from service.codecs.instances import Decoded, decode_labels
from service.codecs.json_numbers import PIECE, brackets, to_float32
from service.codecs.number_parser import DECLINED, Unusual
from service.codecs.requests import CONTROL, MOST_CYCLE, MOST_NAME, Label
from service.errors import Fault
from service.inference.model_loader import Batch, Model

STEP = 1 << 17  # bytes after which a large body is split: what the parser and its buffers need stays in the cache
TAIL = 64  # bytes that may follow the last instance
_BEGIN = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"instances"[ \t\r\n]*:[ \t\r\n]*\[')
_BETWEEN = re.compile(rb"\}[ \t\r\n]*,")
_END = re.compile(rb"\][ \t\r\n]*\}[ \t\r\n]*\Z")
_UNNAMED = Flight(None, None)


class Quick(NamedTuple):
    """The instances of a body: their engines and cycles, and their windows."""

    flights: list[Flight]
    decoded: Decoded


def read_quickly(body: bytes | memoryview, model: Model, most: int) -> Quick | None:
    """Decode a body of nothing but plain instances; None for any other body."""
    window, width = model.manifest.window, len(model.channels)
    if window is None:
        return None
    begin = _BEGIN.match(body)
    end = begin and _END.search(body, max(begin.end(), len(body) - TAIL))
    if begin is None or end is None:
        return None
    first, last = begin.end() - 1, end.start() + 1  # with the brackets
    texts = (bytes(body[first:last]),) if len(body) <= PIECE else _split(body, first + 1, last - 1)
    flights: list[Flight] = []
    labels: list[Label | None] = []
    batches = []
    try:
        for text in texts:
            batches.append(_read(text, flights, labels, window, width))
            if len(flights) > most:
                return None
    except DECLINED:
        return None
    targets = None
    if labels.count(None) < len(labels):
        faults: list[Fault] = []
        targets = decode_labels(labels, model.manifest.classes, faults, lambda i: ("instances", i, "label"))
        if faults:
            return None
    return Quick(flights, Decoded(batches[0] if len(batches) == 1 else np.concatenate(batches), targets, None))


def _split(body: bytes | memoryview, begin: int, end: int) -> Iterator[bytes]:
    """The instances as lists, split behind an object.

    Raises:
        Unusual: an instance is too long.
    """
    while end - begin > PIECE:
        between = _BETWEEN.search(body, begin + STEP, begin + PIECE)
        if between is None:
            raise Unusual
        yield b"".join((b"[", body[begin : between.start() + 1], b"]"))
        begin = between.end()
    yield b"".join((b"[", body[begin:end], b"]"))


def _read(text: bytes, flights: list[Flight], labels: list[Label | None], window: int, width: int) -> Batch:
    """The newest window of each instance of a list (N, window, width); adds to `flights` and `labels`.

    Raises:
        Unusual, or what the parser raises: anything is unusual.
    """
    keys, tables, lengths = number_parser.active.instances(text, width)
    # no instance at all, or a list within a row, which would be flattened
    if not keys or brackets(text) != 1 + len(tables) + sum(lengths):
        raise Unusual
    values = to_float32(tables[0] if len(tables) == 1 else np.concatenate(tables))
    if values is None:
        raise Unusual
    for engine, cycle, label in keys:
        flights.append(_UNNAMED if engine is None and cycle is None else _flight(engine, cycle))
        if label is None or type(label) is int or isinstance(label, str):
            labels.append(label)
        else:
            raise Unusual
    if set(lengths) == {window}:
        return values.reshape(-1, window, width)
    histories = np.split(values.reshape(-1, width), np.cumsum(lengths)[:-1])
    return np.stack([windows.pad_left(history, window) for history in histories])


def _flight(engine: Any, cycle: Any) -> Flight:
    named = engine is None or (isinstance(engine, str) and 0 < len(engine) <= MOST_NAME and not CONTROL.search(engine))
    dated = cycle is None or (type(cycle) is int and 0 <= cycle <= MOST_CYCLE)
    if not (named and dated):
        raise Unusual
    return Flight(engine, cycle)
