"""Decode predict requests; evaluate logits; describe the model. Three parts that share nothing. Knows no HTTP."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model import numerics
from model.numerics import Floats
from service.codecs import requests
from service.codecs.arrow import read_table
from service.codecs.arrow_instances import Flight, decode_histories, histories
from service.codecs.instances import Decoded, decode_instances, decode_labels, decode_logits, refuse
from service.codecs.instances_fast import read_quickly
from service.errors import Fault, InvalidInput
from service.inference.model_loader import Model
from service.inference.predictor import Predictor
from service.server.limits import HEADER_BYTES
from service.settings import Settings
from service.store.new_predictions import Named

# Predict requests: JSON or an Arrow stream to windows


class PredictInputs(NamedTuple):
    """A decoded predict request, ready for the network."""

    instances: Sequence[Named]
    decoded: Decoded
    temperature: float | None
    explain: bool


def read_predict(body: bytes | memoryview, model: Model, most: int) -> PredictInputs:
    """Decode a JSON body of `/v1/predict`.

    Raises:
        NotJson: what its bytes are not.
        InvalidInput: what is wrong with it, and where.
    """
    quick = read_quickly(body, model, most)
    if quick is not None:
        return PredictInputs(quick.flights, quick.decoded, None, False)
    request = requests.parse(body, requests.PredictRequest)
    _check_count(len(request.instances), request.explain, model, most)
    decoded = decode_instances(request.instances, model, request.missing == "hold")
    flights = [Flight(x.engine_id, x.cycle) for x in request.instances]  # whose raw JSON would keep the body
    return PredictInputs(flights, decoded, request.temperature, request.explain)


def read_predict_table(
    body: bytes | memoryview, query: list[tuple[str, str]], model: Model, limits: Settings
) -> PredictInputs:
    """Decode an Arrow stream of flights, with options in the query.

    Raises:
        UnsupportedMediaType: without pyarrow, or for a model whose input is no row of channels.
        NotArrow: what its bytes are not.
        BodyTooLarge: more than the limit when inflated.
        InvalidInput: what is wrong with it, and where.
    """
    options = requests.parse_query(query, requests.PredictOptions)
    instances = histories(read_table(body, limits.max_body_bytes), model)
    _check_count(len(instances.flights), options.explain, model, limits.max_instances)
    decoded = decode_histories(instances, model, options.missing == "hold")
    return PredictInputs(instances.flights, decoded, options.temperature, options.explain)


def _check_count(instances: int, explain: bool, model: Model, most: int) -> None:
    """Refuse more instances than one call may have; an explanation costs as many as there are channels."""
    if explain and model.manifest.conditions is None:
        message = "this model does not say what is usual (`conditions`), so its answers cannot be explained"
        raise InvalidInput(message, (Fault(("explain",), message),))
    verb = "explained" if explain else "taken"
    most = most // max(1, len(model.channels)) if explain else most
    if instances > most:
        refuse([Fault(("instances",), f"{instances} instances, at most {most} are {verb} in one call")])


# Evaluation of logits

PROBABILITY_TOLERANCE = 1e-3  # how near to 1 a row of "logits" in 0..1 must sum to look like probabilities


class EvaluateInputs(NamedTuple):
    """A decoded evaluate request: logits (N, C), and labels as class indices (N,) or as distributions (N, C)."""

    logits: Floats
    distributions: Floats
    labels: Floats | npt.NDArray[np.int64]
    temperature: float
    class_weights: list[float] | None


def evaluate_json(body: bytes | memoryview, classes: tuple[str, ...], most: int) -> dict[str, Any]:
    """Decode and evaluate a body of `/v1/evaluate`.

    Raises:
        NotJson: what its bytes are not.
        InvalidInput: what is wrong with it, and where.
    """
    return evaluate(read_evaluate(body, classes, most))


def read_evaluate(body: bytes | memoryview, classes: tuple[str, ...], most: int) -> EvaluateInputs:
    """Decode a body of `/v1/evaluate`; `classes` name the labels of as many logits.

    Raises:
        NotJson, InvalidInput: as `evaluate_json`.
    """
    request = requests.parse(body, requests.EvaluateRequest)
    logits = decode_logits(bytes(request.logits), most)
    names = classes if logits.shape[1] == len(classes) else tuple(str(k) for k in range(logits.shape[1]))
    faults: list[Fault] = []
    if len(request.labels) != len(logits):
        faults.append(Fault(("labels",), f"{len(request.labels)} labels for {len(logits)} rows of logits"))
    targets = decode_labels(list(request.labels), names, faults, lambda i: ("labels", i))
    refuse(faults)
    assert targets is not None  # there is at least one label, and each is decoded or refused
    # class indices only where every label is one: torch averages weighted losses otherwise for distributions
    hard = not any(isinstance(label, list) for label in request.labels)
    t = 1.0 if request.temperature is None else request.temperature
    return EvaluateInputs(logits, targets, targets.argmax(axis=1) if hard else targets, t, request.class_weights)


def evaluate(inputs: EvaluateInputs) -> dict[str, Any]:
    """Return losses and calibration of logits.

    Raises:
        InvalidInput: class weights that do not fit.
    """
    logits, targets, truth, t, weights = inputs
    try:
        losses = numerics.cross_entropy(logits, truth, t, weights, "none")
        mean = numerics.cross_entropy(logits, truth, t, weights)
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


def _warnings(logits: Floats) -> list[dict[str, Any]]:
    inside = (logits >= 0).all(axis=1) & (abs(logits.sum(axis=1) - 1) <= PROBABILITY_TOLERANCE)
    rows = np.flatnonzero(inside).tolist() if logits.shape[1] > 1 else []
    text = (
        "looks like probabilities, not logits: softmax was applied again, as asked; send ln p to evaluate probabilities"
    )
    return [{"rows": rows, "msg": text}] if rows else []


# Description of the model and the service


def model_json(predictor: Predictor, limits: Settings) -> dict[str, Any]:
    """Return the manifest, flat, without its golden windows, and the settings and limits of this service."""
    return predictor.model.manifest.model_dump(mode="json", exclude={"golden"}) | {
        "digest": predictor.model.digest,
        "temperature": predictor.temperature,
        "temperature_source": predictor.temperature_source,
        "input_shape": predictor.model.input_shape,
        "deterministic": limits.deterministic,
        "batch_difference": predictor.model.batch_difference,
        "planned": predictor.model.planned,
        "limits": {
            "max_body_bytes": limits.max_body_bytes,
            "max_buffered_bytes": limits.max_buffered_bytes,
            "max_instances": limits.max_instances,
            "max_queue_rows": limits.max_queue_rows,
            "max_queue_seconds": limits.max_queue_seconds,
            "max_batch_rows": limits.max_batch_rows,
            "request_seconds": limits.request_seconds,
            "header_bytes": HEADER_BYTES,
            "temperature": [numerics.MIN_TEMPERATURE, numerics.MAX_TEMPERATURE],
        },
    }
