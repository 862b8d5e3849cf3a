"""Parse the most frequent body of `/v1/predict` in one pass; unusual bodies are left to the schemas.

The schemas parse twice, which locates any fault: first the instances, then their numbers. A body of plain instances
(rows of numbers, perhaps an engine, a cycle and a class as label) has no fault to locate, and is parsed here straight
into arrays. A large one is parsed a few instances at a time: a list that is split between objects is JSON if each part
in brackets is JSON.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from model import windows
from service.codecs import number_parser
from service.codecs.arrow_instances import InstanceKey
from service.codecs.instances import DecodedInstances
from service.codecs.labels import decode_labels
from service.codecs.number_parser import DECLINED, PARSE_BYTES, UnusualJson, count_brackets, to_float32
from service.codecs.requests import CONTROL_CHARACTER, MAX_CYCLE, MAX_NAME_LENGTH, Label
from service.errors import Fault
from service.inference.onnx_model import Batch, Model

SPLIT_BYTES = 1 << 17  # of a part of a large body: the memory of the parser then fits into the CPU cache
MAX_TAIL_BYTES = 64  # bytes that may follow the last instance
_BEGIN = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"instances"[ \t\r\n]*:[ \t\r\n]*\[')
_BETWEEN = re.compile(rb"\}[ \t\r\n]*,")
_END = re.compile(rb"\][ \t\r\n]*\}[ \t\r\n]*\Z")
_ANONYMOUS = InstanceKey(None, None)


class PlainInstances(NamedTuple):
    """The instances of a body: their engines and cycles, and their windows."""

    keys: list[InstanceKey]
    decoded: DecodedInstances


def parse_plain_predict(body: bytes | memoryview, model: Model, max_instances: int) -> PlainInstances | None:
    """Decode a body that consists of plain instances only; None for any other body."""
    window, width = model.manifest.window, len(model.channels)
    if window is None:
        return None
    begin = _BEGIN.match(body)
    end = begin and _END.search(body, max(begin.end(), len(body) - MAX_TAIL_BYTES))
    if begin is None or end is None:
        return None
    first, last = begin.end() - 1, end.start() + 1  # of the list, including its brackets
    texts = (bytes(body[first:last]),) if len(body) <= PARSE_BYTES else _split_instances(body, first + 1, last - 1)
    keys: list[InstanceKey] = []
    labels: list[Label | None] = []
    batches = []
    try:
        for text in texts:
            batches.append(_parse_windows(text, keys, labels, window, width))
            if len(keys) > max_instances:
                return None
    except DECLINED:
        return None
    targets = None
    if labels.count(None) < len(labels):
        faults: list[Fault] = []
        targets = decode_labels(labels, model.manifest.classes, faults, lambda i: ("instances", i, "label"))
        if faults:
            return None
    telemetry = batches[0] if len(batches) == 1 else np.concatenate(batches)
    return PlainInstances(keys, DecodedInstances(telemetry, targets, None))


def _split_instances(body: bytes | memoryview, begin: int, end: int) -> Iterator[bytes]:
    """Yield the instances as JSON lists, split between objects.

    Raises:
        UnusualJson: an instance is too long.
    """
    while end - begin > PARSE_BYTES:
        between = _BETWEEN.search(body, begin + SPLIT_BYTES, begin + PARSE_BYTES)
        if between is None:
            raise UnusualJson
        yield b"".join((b"[", body[begin : between.start() + 1], b"]"))
        begin = between.end()
    yield b"".join((b"[", body[begin:end], b"]"))


def _parse_windows(text: bytes, keys: list[InstanceKey], labels: list[Label | None], window: int, width: int) -> Batch:
    """Return the newest window of each instance of a list (N, window, width); append to `keys` and `labels`.

    Raises:
        one of DECLINED: the text is not a list of plain instances.
    """
    key_values, tables, lengths = number_parser.active.instances(text, width)
    # no instances, or a list within a row, which would be flattened
    if not key_values or count_brackets(text) != 1 + len(tables) + sum(lengths):
        raise UnusualJson
    values = to_float32(tables[0] if len(tables) == 1 else np.concatenate(tables))
    if values is None:
        raise UnusualJson
    for engine, cycle, label in key_values:
        keys.append(_ANONYMOUS if engine is None and cycle is None else _instance_key(engine, cycle))
        if label is None or type(label) is int or isinstance(label, str):
            labels.append(label)
        else:
            raise UnusualJson
    if set(lengths) == {window}:
        return values.reshape(-1, window, width)
    histories = np.split(values.reshape(-1, width), np.cumsum(lengths)[:-1])
    return np.stack([windows.pad_left(history, window) for history in histories])


def _instance_key(engine: Any, cycle: Any) -> InstanceKey:
    valid_engine = engine is None or (
        isinstance(engine, str) and 0 < len(engine) <= MAX_NAME_LENGTH and not CONTROL_CHARACTER.search(engine)
    )
    valid_cycle = cycle is None or (type(cycle) is int and 0 <= cycle <= MAX_CYCLE)
    if not (valid_engine and valid_cycle):
        raise UnusualJson
    return InstanceKey(engine, cycle)
