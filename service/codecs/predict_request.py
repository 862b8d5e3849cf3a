"""Decode predict and evaluate requests."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.numerics import Floats
from service.codecs import parse, requests
from service.codecs.arrow import read_table
from service.codecs.arrow_instances import InstanceKey, decode_table, group_instances
from service.codecs.faults import refuse
from service.codecs.instances import DecodedInstances, decode_instances, decode_logits
from service.codecs.instances_fast import parse_plain_predict
from service.codecs.labels import decode_labels
from service.errors import Fault, InvalidInput
from service.inference.onnx_model import Model
from service.settings import Settings
from service.store.new_predictions import NamedRow


class PredictInputs(NamedTuple):
    """A decoded predict request, ready for the network."""

    instances: Sequence[NamedRow]
    decoded: DecodedInstances
    temperature: float | None
    explain: bool


def decode_predict(body: bytes | memoryview, model: Model, max_instances: int) -> PredictInputs:
    """Decode a JSON body of `/v1/predict`.

    Raises:
        MalformedJson: the body is not JSON.
        InvalidInput: wrong values, with their places.
    """
    plain = parse_plain_predict(body, model, max_instances)
    if plain is not None:
        return PredictInputs(plain.keys, plain.decoded, None, False)
    request = parse.parse(body, requests.PredictRequest)
    _check_count(len(request.instances), request.explain, model, max_instances)
    decoded = decode_instances(request.instances, model, request.missing == "hold")
    keys = [InstanceKey(x.engine_id, x.cycle) for x in request.instances]  # without references to the body
    return PredictInputs(keys, decoded, request.temperature, request.explain)


def decode_predict_table(
    body: bytes | memoryview, query: list[tuple[str, str]], model: Model, limits: Settings
) -> PredictInputs:
    """Decode an Arrow stream of flights, with options in the query.

    Raises:
        UnsupportedMediaType: pyarrow is not installed, or the input of the model is not a row of channels.
        MalformedArrow: the body is not an Arrow stream.
        BodyTooLarge: more than the limit when inflated.
        InvalidInput: wrong values, with their places.
    """
    options = parse.parse_query(query, requests.PredictOptions)
    instances = group_instances(read_table(body, limits.max_body_bytes), model)
    _check_count(len(instances.keys), options.explain, model, limits.max_instances)
    decoded = decode_table(instances, model, options.missing == "hold")
    return PredictInputs(instances.keys, decoded, options.temperature, options.explain)


def _check_count(instances: int, explain: bool, model: Model, max_instances: int) -> None:
    """Reject more instances than the limit of one call; an explained one counts once per channel."""
    if explain and model.manifest.conditions is None:
        message = "the manifest of this model has no baselines (`conditions`), so predictions cannot be explained"
        raise InvalidInput(message, (Fault(("explain",), message),))
    kind = "explained instances" if explain else "instances"
    limit = max_instances // max(1, len(model.channels)) if explain else max_instances
    if instances > limit:
        refuse([Fault(("instances",), f"{instances} instances, the limit is {limit} {kind} per call")])


class EvaluateInputs(NamedTuple):
    """A decoded evaluate request: logits (N, C), and labels as class indices (N,) or as distributions (N, C)."""

    logits: Floats
    distributions: Floats
    labels: Floats | npt.NDArray[np.int64]
    temperature: float
    class_weights: list[float] | None


def decode_evaluate(body: bytes | memoryview, classes: tuple[str, ...], max_rows: int) -> EvaluateInputs:
    """Decode a body of `/v1/evaluate`; `classes` are the class names if each row has as many logits.

    Raises:
        MalformedJson: the body is not JSON.
        InvalidInput: a wrong value, with its place.
    """
    request = parse.parse(body, requests.EvaluateRequest)
    logits = decode_logits(bytes(request.logits), max_rows)
    names = classes if logits.shape[1] == len(classes) else tuple(str(k) for k in range(logits.shape[1]))
    faults: list[Fault] = []
    if len(request.labels) != len(logits):
        faults.append(Fault(("labels",), f"{len(request.labels)} labels for {len(logits)} rows of logits"))
    targets = decode_labels(list(request.labels), names, faults, lambda i: ("labels", i))
    refuse(faults)
    assert targets is not None  # there is at least one label, and each is decoded or refused
    # class indices only where every label is one: torch averages weighted losses otherwise for distributions
    hard = not any(isinstance(label, list) for label in request.labels)
    labels = targets.argmax(axis=1) if hard else targets
    temperature = 1.0 if request.temperature is None else request.temperature
    return EvaluateInputs(logits, targets, labels, temperature, request.class_weights)
