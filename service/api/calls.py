"""What each call does between its bytes: parse, decode, ask the use case, shape the answer. Knows no HTTP."""

import os
import uuid
from typing import Any

import numpy as np

from model import numerics
from model.occlusion import Shift
from service.api import schemas
from service.api.decode import decode_instances, decode_labels, decode_logits, refuse
from service.errors import Fault, InvalidInput
from service.predictor import Prediction, Predictor
from service.settings import Settings

PROBABILITY_TOLERANCE = 1e-3  # how near to 1 a row of "logits" in 0..1 must sum to look like probabilities


def predict_json(body: bytes, predictor: Predictor, most: int) -> dict[str, Any]:
    """The whole of `/v1/predict` between its bytes."""
    asked = schemas.parse(body, schemas.PredictRequest)
    if len(asked.instances) > most:
        refuse([Fault(("instances",), f"{len(asked.instances)} instances, at most {most} are taken in one call")])
    explained = most // max(1, len(predictor.model.manifest.channels))
    if asked.explain and len(asked.instances) > explained:
        refuse(
            [Fault(("instances",), f"{len(asked.instances)} instances, at most {explained} are explained in one call")]
        )
    decoded = decode_instances(asked.instances, predictor.model, asked.missing == "hold")
    found = predictor.predict(decoded.telemetry, decoded.targets, asked.temperature, decoded.imputed)
    manifest = predictor.model.manifest
    rows = _rows(asked.instances, found, manifest.classes)
    if asked.explain:
        for row, moved in zip(rows, predictor.explain(decoded.telemetry, found), strict=True):
            row["explanation"] = [_moved(shift, manifest.channel_names, manifest.classes) for shift in moved]
    return {
        "model": {"name": manifest.name, "version": manifest.version, "digest": predictor.model.digest},
        "temperature": found.temperature,
        "temperature_source": "artefact" if asked.temperature is None else "request",
        "predictions": rows,
        "evaluation": vars(found.evaluation) if found.evaluation else None,
    }


def _rows(instances: list[schemas.Instance], found: Prediction, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    probabilities, top = found.probabilities.astype(np.float32), found.logits.argmax(axis=1)
    rows: list[dict[str, Any]] = []
    for i, instance in enumerate(instances):
        row = {
            "prediction_id": uuid.UUID(bytes=os.urandom(16), version=4).hex,
            "engine_id": instance.engine_id,
            "cycle": instance.cycle,
            "health": classes[top[i]],
            "probabilities": dict(zip(classes, probabilities[i], strict=True)),
            "logits": found.logits[i],
            "expected_loss": found.expected_loss[i],
            "loss": None if np.isnan(found.loss[i]) else found.loss[i],
        }
        if found.rul is not None:
            row["rul"] = found.rul[i]
        if found.sets is not None:
            row["prediction_set"] = [classes[k] for k in np.flatnonzero(found.sets[i])]
        rows.append(row)
    return rows


def _moved(moved: Shift, channels: tuple[str, ...], classes: tuple[str, ...]) -> dict[str, Any]:
    row = {"channel": channels[moved.channel], "shift": moved.shift, "toward": classes[moved.toward]}
    return row if moved.rul is None else row | {"rul": moved.rul}


def evaluate_json(body: bytes, classes: tuple[str, ...], most: int) -> dict[str, Any]:
    """The whole of `/v1/evaluate` between its bytes."""
    asked = schemas.parse(body, schemas.EvaluateRequest)
    logits = decode_logits(asked.logits, most)
    names = classes if logits.shape[1] == len(classes) else tuple(str(k) for k in range(logits.shape[1]))
    faults: list[Fault] = []
    if len(asked.labels) != len(logits):
        faults.append(Fault(("labels",), f"{len(asked.labels)} labels for {len(logits)} rows of logits"))
    targets = decode_labels(list(asked.labels), names, faults, lambda i: ("labels", i))
    refuse(faults)
    assert targets is not None  # there is at least one label, and each is decoded or refused
    # class indices only where every label is one: torch averages weighted losses otherwise for distributions
    hard = not any(isinstance(label, list) for label in asked.labels)
    truth, t = (targets.argmax(axis=1) if hard else targets), 1.0 if asked.temperature is None else asked.temperature
    try:
        losses = numerics.cross_entropy(logits, truth, t, asked.class_weights, "none")
        mean = numerics.cross_entropy(logits, truth, t, asked.class_weights)
    except ValueError as error:
        raise InvalidInput(f"class_weights: {error}", (Fault(("class_weights",), str(error)),)) from None
    return {
        "count": len(logits),
        "temperature": t,
        "probabilities": numerics.softmax(logits, t),
        "losses": losses,
        "cross_entropy": float(mean),
        "accuracy": float(numerics.correct(logits, targets).mean()),
        "brier": float(numerics.brier(logits, targets, t).mean()),
        "ece": numerics.ece(logits, targets, t),
        "warnings": _warnings(logits),
    }


def _warnings(logits: numerics.Floats) -> list[dict[str, Any]]:
    inside = (logits >= 0).all(axis=1) & (abs(logits.sum(axis=1) - 1) <= PROBABILITY_TOLERANCE)
    rows = np.flatnonzero(inside).tolist() if logits.shape[1] > 1 else []
    text = (
        "looks like probabilities, not logits: softmax was applied again, as asked; send ln p to evaluate probabilities"
    )
    return [{"rows": rows, "msg": text}] if rows else []


def model_json(predictor: Predictor, limits: Settings) -> dict[str, Any]:
    """The manifest, flat, without its golden windows, and what is true of this service."""
    return predictor.model.manifest.model_dump(mode="json", exclude={"golden"}) | {
        "digest": predictor.model.digest,
        "temperature": predictor.temperature,
        "temperature_source": "artefact",
        "input_shape": predictor.model.input_shape,
        "limits": {
            "max_body_bytes": limits.max_body_bytes,
            "max_instances": limits.max_instances,
            "temperature": [numerics.MIN_TEMPERATURE, numerics.MAX_TEMPERATURE],
        },
    }
