"""Encode predictions as JSON rows, column by column, without a Python object per number. Independent of HTTP.

All numbers of an inference are written by one call of the JSON writer, once for all requests of the batch. It writes
float32 in the shortest form. Each row is a template that is filled with these texts.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from model.evaluation.occlusion import ChannelAttribution
from service.inference.onnx_model import Model
from service.inference.predictions import Evaluation, PredictionResult, Predictions
from service.inference.predictor import Predictor
from service.store.new_predictions import NamedRow

NULL = b"null"
ROW_TEMPLATE = b'{"prediction_id":%s,"engine_id":%s,"cycle":%s,%s,"loss":%s%s%s}'


def prediction_rows(
    model: Model, instances: Sequence[NamedRow], prediction: PredictionResult, ids: Sequence[str | None]
) -> list[bytes]:
    """Return one JSON object per instance, in order."""
    write = _row_writer(model.manifest.classes)
    parts: list[tuple[bytes, bytes]] = []
    for piece in prediction.pieces:
        texts = piece.output.derived.get(write)
        if texts is None:
            texts = piece.output.derived[write] = write(piece.output.answers)
        parts += texts[piece.begin : piece.end]
    losses = None if prediction.loss is None else _number_texts([prediction.loss[:, None]])
    rows = []
    for i, (instance, (health, sets)) in enumerate(zip(instances, parts, strict=True)):
        prediction_id, engine_id, cycle = ids[i], instance.engine_id, instance.cycle
        keys = (
            NULL if prediction_id is None else orjson.dumps(prediction_id),
            NULL if engine_id is None else orjson.dumps(engine_id),
            NULL if cycle is None else b"%d" % cycle,
        )
        explanation = b""
        if prediction.explanation is not None:
            explanation = b',"explanation":' + _explanation_text(prediction.explanation[i], model)
        rows.append(ROW_TEMPLATE % (*keys, health, NULL if losses is None else losses[i][0], sets, explanation))
    return rows


def envelope(
    predictor: Predictor, rows: Sequence[bytes], prediction: PredictionResult, what_if: bool, extra: dict[str, Any]
) -> bytes:
    """Return the JSON body of a response with these rows.

    Args:
        predictor: the active predictor.
        rows: one JSON object per instance, at least one.
        prediction: the prediction of the rows.
        what_if: whether the request gave the temperature.
        extra: fields that are added at the end.
    """
    manifest, digest = predictor.model.manifest, predictor.model.digest
    source = "request" if what_if else predictor.temperature_source
    tail, evaluation = [b"]"], _evaluation_means(prediction.evaluation) if prediction.evaluation else None
    for name, value in {"evaluation": evaluation, **extra}.items():
        tail.append(b',"%s":%s' % (name.encode(), orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)))
    first, *others = rows  # all are joined once, because together they may have hundreds of megabytes
    parts = [_head(manifest.name, manifest.version, digest, prediction.temperature, source) + first, *others]
    parts[-1] += b"".join((*tail, b"}"))
    return b",".join(parts)


@lru_cache(maxsize=64)
def _head(name: str, version: str, digest: str, temperature: float, source: str) -> bytes:
    model = {"name": name, "version": version, "digest": digest}
    head = orjson.dumps({"model": model, "temperature": temperature, "temperature_source": source})
    return head[:-1] + b',"predictions":['


def _evaluation_means(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value if name == "count" else np.float32(value) for name, value in vars(evaluation).items()}


@lru_cache(maxsize=16)
def _row_writer(classes: tuple[str, ...]) -> Callable[[Predictions], list[tuple[bytes, bytes]]]:
    """Return a function that writes the part of each row before its loss, and the prediction set after it."""
    names, width = _class_texts(classes), len(classes)
    escaped = [name.replace(b"%", b"%%") for name in names]
    template = b'"health":%s,"probabilities":{' + b",".join(name + b":%s" for name in escaped) + b"}"
    template += b',"logits":[%s],"expected_loss":%s'

    def write(answers: Predictions) -> list[tuple[bytes, bytes]]:
        columns: list[npt.NDArray[Any]] = [answers.probabilities, answers.logits, answers.expected_loss[:, None]]
        columns += [] if answers.rul is None else [answers.rul[:, None]]
        row_template = template if answers.rul is None else template + b',"rul":%s'
        tops, texts = answers.logits.argmax(axis=1).tolist(), _number_texts(columns)
        sets = [b""] * len(texts) if answers.sets is None else _set_texts(classes, answers.sets)
        return [
            (row_template % (names[top], *row[:width], b",".join(row[width : 2 * width]), *row[2 * width :]), inside)
            for top, row, inside in zip(tops, texts, sets, strict=True)
        ]

    return write


def _number_texts(columns: list[npt.NDArray[Any]]) -> list[list[bytes]]:
    """Return the JSON texts of the numbers of each row."""
    table = np.concatenate(columns, axis=1, dtype=np.float32, casting="same_kind")
    text = orjson.dumps(table, option=orjson.OPT_SERIALIZE_NUMPY)
    return [row.split(b",") for row in text[2:-2].split(b"],[")]


@lru_cache(maxsize=16)
def _class_texts(classes: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(map(orjson.dumps, classes))


def _set_texts(classes: tuple[str, ...], inside: npt.NDArray[np.bool_]) -> list[bytes]:
    """Return the prediction set of each row as JSON; texts are cached where there are few classes, thus few sets."""
    if len(classes) > 8:
        return [_set_text(classes, row.tobytes()) for row in inside]
    return [_cached_set_text(classes, row.tobytes()) for row in inside]


def _set_text(classes: tuple[str, ...], inside: bytes) -> bytes:
    names = [name for name, is_inside in zip(_class_texts(classes), inside, strict=True) if is_inside]
    return b',"prediction_set":[%s]' % b",".join(names)


_cached_set_text = lru_cache(maxsize=1024)(_set_text)


def _explanation_text(shifts: list[ChannelAttribution], model: Model) -> bytes:
    channels, classes = model.channels, model.manifest.classes
    rows: list[dict[str, Any]] = []
    for shift in shifts:
        rows.append({"channel": channels[shift.channel], "shift": shift.shift, "toward": classes[shift.toward]})
        if shift.rul is not None:
            rows[-1]["rul"] = shift.rul
    return orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)
