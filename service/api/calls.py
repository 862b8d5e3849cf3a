"""What each call does between its bytes: parse, decode, ask the use case, shape the answer. Knows no HTTP."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from model import numerics
from service.api import schemas
from service.api.arrow import read_table
from service.api.decode import Decoded, decode_instances, decode_labels, decode_logits, refuse
from service.api.flights import Flight, decode_histories, histories
from service.api.quick import read_quickly
from service.errors import Fault, InvalidInput
from service.memory import Named
from service.predictor import Predictor
from service.runtime import Model
from service.settings import Settings

HEADER_BYTES = 64 * 1024  # of one request's line and headers
PROBABILITY_TOLERANCE = 1e-3  # how near to 1 a row of "logits" in 0..1 must sum to look like probabilities


class Asked(NamedTuple):
    """A prediction that is asked for, ready for the network."""

    instances: Sequence[Named]
    decoded: Decoded
    temperature: float | None
    explain: bool


def read_predict(body: bytes | memoryview, model: Model, most: int) -> Asked:
    """A body of `/v1/predict`, decoded.

    Raises:
        NotJson: what its bytes are not.
        InvalidInput: what is wrong with it, and where.
    """
    found = read_quickly(body, model, most)
    if found is not None:
        return Asked(found.flights, found.decoded, None, False)
    asked = schemas.parse(body, schemas.PredictRequest)
    _admit(len(asked.instances), asked.explain, model, most)
    decoded = decode_instances(asked.instances, model, asked.missing == "hold")
    flights = [Flight(x.engine_id, x.cycle) for x in asked.instances]  # whose raw JSON would keep the body
    return Asked(flights, decoded, asked.temperature, asked.explain)


def read_predict_table(body: bytes | memoryview, query: list[tuple[str, str]], model: Model, limits: Settings) -> Asked:
    """The same as an Arrow stream of flights, and options in the query.

    Raises:
        UnsupportedMediaType: without pyarrow, or for a model whose input is no row of channels.
        NotArrow: what its bytes are not.
        BodyTooLarge: more than the limit when inflated.
        InvalidInput: what is wrong with it, and where.
    """
    asked = schemas.parse_query(query, schemas.PredictOptions)
    found = histories(read_table(body, limits.max_body_bytes), model)
    _admit(len(found.flights), asked.explain, model, limits.max_instances)
    decoded = decode_histories(found, model, asked.missing == "hold")
    return Asked(found.flights, decoded, asked.temperature, asked.explain)


def _admit(instances: int, explain: bool, model: Model, most: int) -> None:
    """Refuse more instances than one call may have; an explanation costs as many as there are channels."""
    if explain and model.manifest.conditions is None:
        message = "this model does not say what is usual (`conditions`), so its answers cannot be explained"
        raise InvalidInput(message, (Fault(("explain",), message),))
    verb = "explained" if explain else "taken"
    most = most // max(1, len(model.channels)) if explain else most
    if instances > most:
        refuse([Fault(("instances",), f"{instances} instances, at most {most} are {verb} in one call")])


def evaluate_json(body: bytes | memoryview, classes: tuple[str, ...], most: int) -> dict[str, Any]:
    """The whole of `/v1/evaluate` between its bytes."""
    asked = schemas.parse(body, schemas.EvaluateRequest)
    logits = decode_logits(bytes(asked.logits), most)
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
