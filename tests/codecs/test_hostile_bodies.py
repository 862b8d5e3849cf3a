"""Long invalid bodies are located, and never take many times their size in memory."""

import json
import subprocess
import sys

import numpy as np
import pytest

from model.evaluation.evaluate import ARTEFACT
from service.api.evaluate import evaluate_logits
from service.codecs.predict_request import decode_evaluate, decode_predict
from service.errors import InvalidInput, MalformedJson
from service.inference.model_loader import open_model
from service.inference.onnx_model import Model

CHANNELS = 17
MANY = 4 << 20  # lists
GROWN = """
import resource, sys
from model.evaluation.evaluate import ARTEFACT
from service.codecs import number_parser
from service.api.evaluate import evaluate_logits
from service.codecs.predict_request import decode_evaluate, decode_predict
from service.errors import ServiceError
from service.inference.model_loader import open_model
model, body = open_model(ARTEFACT), sys.stdin.buffer.read()
if sys.argv[1] == "portable":
    number_parser.active = number_parser.PortableParser()
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = most()
try:
    if b"logits" in body:
        evaluate_logits(decode_evaluate(body, ("a", "b"), 10**9))
    else:
        decode_predict(body, model, 10**9)
except ServiceError as error:
    print(most() - before, error.detail)
"""


@pytest.fixture(scope="module")
def model() -> Model:
    """The committed artefact."""
    return open_model(ARTEFACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (b'{"instances":[{"telemetry":[1.25,%s]}]}', "instances[0].telemetry: expected rows of numbers"),
        (b'{"instances":[{"telemetry":[[1],{},%s]}]}', "instances[0].telemetry: expected numbers, got many objects"),
        (
            b'{"instances":[{"telemetry":[%s]}]}',
            "instances[0].telemetry[0]: expected a row of 17 numbers, got 0 values",
        ),
        (b'{"instances":[{"telemetry":{"setting_1":[%s]}}]}', "instances[0].telemetry: expected a list of values"),
        (b'{"logits":[[1,2],%s],"labels":[0]}', "logits[1]: expected a row of 2 numbers, got 0 values"),
    ],
)
@pytest.mark.parametrize("parser", ["simdjson", "portable"])
def test_millions_of_brackets_take_little_memory(form: bytes, expected: str, parser: str) -> None:
    """Millions of empty lists, objects or numbers are located without building all objects."""
    filling = next(some for some in (b"1.25,", b"{},", b"[],") if some in form or some == b"[],")
    body = form % (filling * MANY)[:-1]
    run = subprocess.run([sys.executable, "-c", GROWN, parser], input=body, capture_output=True, check=True)
    grown, _, detail = run.stdout.decode().partition(" ")
    assert detail.startswith(expected)
    assert float(grown) < 150  # MiB; as objects they would take 270


@pytest.mark.slow
def test_fault_far_into_a_body_is_located(model: Model) -> None:
    """An invalid value and a short row some megabytes into a history are reported by row and channel."""
    rows = np.random.default_rng(0).normal(500, 1, (20_000, CHANNELS)).tolist()
    rows[15_000][3], rows[19_999] = None, [1.0]
    with pytest.raises(InvalidInput) as refused:
        decode_predict(json.dumps({"instances": [{"telemetry": rows}]}).encode(), model, 10)
    assert [fault.loc[:4] for fault in refused.value.faults] == [
        ("instances", 0, "telemetry", 15_000),
        ("instances", 0, "telemetry", 19_999),
    ]


@pytest.mark.slow
def test_invalid_logits_far_into_a_body_are_located() -> None:
    """An invalid logit some megabytes into a body is reported by row and class."""
    rows = np.random.default_rng(0).normal(0, 1, (200_000, 3)).tolist()
    rows[150_000][2] = "1"
    with pytest.raises(InvalidInput) as refused:
        evaluate_logits(
            decode_evaluate(json.dumps({"logits": rows, "labels": [0] * len(rows)}).encode(), ("a", "b", "c"), 10**6)
        )
    assert [fault.loc for fault in refused.value.faults] == [("logits", 150_000, 2)]


def test_long_list_with_trailing_comma_is_malformed(model: Model) -> None:
    """A trailing comma is malformed also in a list that is parsed in pieces."""
    row = json.dumps([None] + [1.0] * (CHANNELS - 1))
    text = ",".join([row.replace("null", "1e0")] * 20_000)
    for bad in (text + ",", text + f",{row},"):
        with pytest.raises(MalformedJson):
            decode_predict(b'{"instances":[{"telemetry":[%s]}],"missing":"hold"}' % bad.encode(), model, 10)
