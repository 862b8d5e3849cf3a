"""Predictions as the rows of an answer, written by the column: no Python object for a number. Knows no HTTP.

All numbers of all rows leave in one call of the JSON writer, which gives float32 in its shortest form; a row is then a
template into which its texts are put.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from model.occlusion import Shift
from service.memory import Named
from service.predictor import Prediction
from service.runtime import Model

NONE = b"null"


def prediction_rows(
    model: Model, instances: Sequence[Named], found: Prediction, ids: Sequence[str | None]
) -> list[orjson.Fragment]:
    """One object an instance, in their order, for `orjson.dumps` to put where they belong."""
    answers, classes = found.answers, model.manifest.classes
    template = _template(classes, answers.rul is not None, answers.sets is not None, found.moved is not None)
    columns: list[npt.NDArray[Any]] = [answers.probabilities, answers.logits, answers.expected_loss[:, None]]
    columns += [] if answers.rul is None else [answers.rul[:, None]]
    columns += [] if found.loss is None else [found.loss[:, None]]
    healths, width = answers.logits.argmax(axis=1).tolist(), len(classes)
    sets = None if answers.sets is None else _sets(classes, answers.sets)
    rows = []
    for i, (instance, numbers) in enumerate(zip(instances, _texts(columns), strict=True)):
        probabilities, logits, others = numbers[:width], numbers[width : 2 * width], numbers[2 * width :]
        loss = NONE if found.loss is None else others.pop()
        fields = [_text(ids[i]), _text(instance.engine_id), _number(instance.cycle), _names(classes)[healths[i]]]
        fields += [*probabilities, b",".join(logits), *others, loss]
        if sets is not None:
            fields.append(sets[i])
        if found.moved is not None:
            fields.append(_explanation(found.moved[i], model))
        rows.append(orjson.Fragment(template % tuple(fields)))
    return rows


def _texts(columns: list[npt.NDArray[Any]]) -> list[list[bytes]]:
    """The numbers of each row as they are written."""
    table = np.concatenate(columns, axis=1, dtype=np.float32, casting="same_kind")
    text = orjson.dumps(table, option=orjson.OPT_SERIALIZE_NUMPY)
    return [row.split(b",") for row in text[2:-2].split(b"],[")]


@lru_cache(maxsize=16)
def _template(classes: tuple[str, ...], rul: bool, sets: bool, explained: bool) -> bytes:
    names = [name.replace(b"%", b"%%") for name in _names(classes)]
    parts = [b'{"prediction_id":%s,"engine_id":%s,"cycle":%s,"health":%s,"probabilities":{']
    parts += [b",".join(name + b":%s" for name in names), b'},"logits":[%s],"expected_loss":%s']
    parts += [b',"rul":%s'] if rul else []
    parts.append(b',"loss":%s')
    parts += [b',"prediction_set":%s'] if sets else []
    parts += [b',"explanation":%s'] if explained else []
    return b"".join((*parts, b"}"))


@lru_cache(maxsize=16)
def _names(classes: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(map(orjson.dumps, classes))


def _sets(classes: tuple[str, ...], inside: npt.NDArray[np.bool_]) -> list[bytes]:
    """Which classes each row's prediction set holds; few classes have few sets, and each is written once."""
    if len(classes) > 8:
        return [_set(classes, row.tobytes()) for row in inside]
    return [_kept_set(classes, row.tobytes()) for row in inside]


def _set(classes: tuple[str, ...], inside: bytes) -> bytes:
    return b"[" + b",".join(name for name, there in zip(_names(classes), inside, strict=True) if there) + b"]"


_kept_set = lru_cache(maxsize=1024)(_set)


def _text(value: str | None) -> bytes:
    return NONE if value is None else orjson.dumps(value)


def _number(value: int | None) -> bytes:
    return NONE if value is None else b"%d" % value


def _explanation(shifts: list[Shift], model: Model) -> bytes:
    channels, classes = model.channels, model.manifest.classes
    told: list[dict[str, Any]] = []
    for shift in shifts:
        told.append({"channel": channels[shift.channel], "shift": shift.shift, "toward": classes[shift.toward]})
        if shift.rul is not None:
            told[-1]["rul"] = shift.rul
    return orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY)
