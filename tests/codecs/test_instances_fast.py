import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.evaluation.evaluate import ARTEFACT
from service.codecs import parse, requests
from service.codecs.instances import decode_instances
from service.codecs.instances_fast import parse_plain_predict
from service.codecs.number_parser import PARSE_BYTES
from service.codecs.predict_request import decode_predict
from service.errors import ServiceError
from service.inference.model_loader import open_model
from service.inference.onnx_model import Model

pytestmark = pytest.mark.usefixtures("each_parser")
CHANNELS = 17
WINDOW = 100
NUMBERS = st.one_of(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.integers(-(2**40), 2**40),
    st.sampled_from([1e39, -1e39, 3.4e38, 10**25, 0, -0.0]),
)
OTHERS: st.SearchStrategy[Any] = st.sampled_from([None, True, "1", [1.0], {}, [], [[2]]])
CELLS = st.one_of(*[NUMBERS] * 9, OTHERS)
NAMES = st.sampled_from(
    ["FD001-24", "", "[", "}, {", ']}, {"telemetry": [', "a" * 201, "a\0b", "\u00e9" * 200, 7, None, True]
)


@st.composite
def telemetries(draw: st.DrawFn) -> Any:
    """Draw rows of numbers, of which one may be too short and one value anything."""
    rows: Any = draw(st.lists(st.lists(NUMBERS, min_size=CHANNELS, max_size=CHANNELS), max_size=4))
    if rows and draw(st.booleans()):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, CHANNELS - 1))] = draw(CELLS)
        if draw(st.integers(0, 5)) == 0:
            row.pop()
    return draw(st.sampled_from([rows, rows, rows, rows, [rows], None, {"sensor_2": [1.0]}, 3]))


INSTANCES: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"telemetry": telemetries()},
    optional={
        "engine_id": NAMES,
        "cycle": st.sampled_from([0, 143, -1, 2**53, 2**53 + 1, 1.0, True, None, "3"]),
        "label": st.sampled_from(
            [None, "critical", "[", "unknown", 0, 2, 3, -1, 1.0, True, [0, 0.5, 0.5], [], 2**70, {}]
        ),
    },
)
BODIES = st.fixed_dictionaries(
    {"instances": st.lists(INSTANCES, max_size=3)},
    optional={"missing": st.sampled_from(["reject", "hold"]), "temperature": st.just(2.0), "more": st.just(1)},
)


@pytest.fixture(scope="module")
def model() -> Model:
    """The committed artefact."""
    return open_model(ARTEFACT)


def parse_by_schemas(body: bytes, model: Model) -> tuple[list[tuple[str | None, int | None]], bytes, bytes | None]:
    """Return names, windows and labels of a body as the schemas decode it."""
    request = parse.parse(body, requests.PredictRequest)
    decoded = decode_instances(request.instances, model, request.missing == "hold")
    assert request.temperature is None
    targets = None if decoded.targets is None else decoded.targets.tobytes()
    return [(x.engine_id, x.cycle) for x in request.instances], decoded.telemetry.tobytes(), targets


@given(BODIES, st.sampled_from([None, 2]))
def test_fast_parser_equals_the_schemas_or_declines(model: Model, request: Any, indent: int | None) -> None:
    """Whatever the fast parser accepts equals the result of the schemas to the bit."""
    body = json.dumps(request, indent=indent).encode()
    decoded = parse_plain_predict(body, model, 4096)
    if decoded is not None:
        names = [(flight.engine_id, flight.cycle) for flight in decoded.keys]
        targets = None if decoded.decoded.targets is None else decoded.decoded.targets.tobytes()
        assert parse_by_schemas(body, model) == (names, decoded.decoded.telemetry.tobytes(), targets)


@pytest.mark.parametrize(
    "body",
    [
        b'{"instances":[{"telemetry":%s}]',
        b'{"instances":[{"telemetry":%s}]}x',
        b'{"instances":[{"telemetry":%s}],"instances":[{"telemetry":%s}]}',
        b'{"instances":[{"telemetry":%s,"telemetry":[[1]]}]}',
        b'\xff{"instances":[{"telemetry":%s}]}',
        b'\xef\xbb\xbf{"instances":[{"telemetry":%s}]}',
        b'{"instances":[{"telemetry":%s,"engine_id":"\xff"}]}',
        *(b"", b"[]", b"3", b"null", b'{"instances":3}', b'{"instances":[3]}', b'{"instances":{"a":{"telemetry":%s}}}'),
        *(b'{"instances":[{"telemetry":3}]}', b'{"instances":[{"telemetry":{"seventeen_letters":[1]}}]}'),
        b'{"instances":[{"telemetry":%s},{"telemetry":%s}',
        b'{"instances":[{"telemetry":%s},{"telemetry":%s},]}',
        b'{"instances":[{"telemetry":%s}],{"telemetry":%s}]}',
        b'{"instances":[{"telemetry":%s}]},{"telemetry":%s}]}',
        b'{"instances":[{"telemetry":%s}],"more":[{"telemetry":%s},{"telemetry":%s}]}',
        b'{"instances":[[{"telemetry":%s},{"telemetry":%s}]]}',
        b'[{"telemetry":%s},{"telemetry":%s}]',
    ],
)
def test_fast_parser_declines_unusual_bodies(model: Model, body: bytes) -> None:
    """The fast parser declines malformed JSON and duplicate names."""
    row = json.dumps([[1.0] * CHANNELS] * WINDOW).encode()
    assert parse_plain_predict(body.replace(b"%s", row), model, 4096) is None


@pytest.mark.parametrize("within", [0, 1, 2, CHANNELS - 1, CHANNELS, CHANNELS + 1, 2 * CHANNELS + 1])
def test_list_within_a_row_is_no_row(model: Model, within: int) -> None:
    """A list of any length in place of a number is not read as further rows."""
    rows = [[1.0] * CHANNELS, [[2.0] * within, *[3.0] * (CHANNELS - 1)]]
    body = json.dumps({"instances": [{"telemetry": rows}, {"telemetry": rows[:1]}]}).encode()
    assert parse_plain_predict(body, model, 4096) is None
    with pytest.raises(ServiceError, match=r"telemetry\[1\].*expected a number, got a list"):
        decode_predict(body, model, 4096)


def test_plain_bodies_are_read_in_one_pass(model: Model) -> None:
    """The fast parser accepts full, short and long windows with and without names."""
    rows = np.random.default_rng(0).normal(500, 100, (3, 130, CHANNELS)).tolist()
    instances = [{"telemetry": rows[0]}, {"telemetry": rows[1][:3], "engine_id": "a"}, {"telemetry": rows[2][:WINDOW]}]
    body = json.dumps({"instances": [*instances, {"cycle": 5, "telemetry": rows[0][:1], "label": 1}]}).encode()
    plain = parse_plain_predict(body, model, 4)
    assert plain is not None
    assert plain.decoded.targets is not None
    assert parse_by_schemas(body, model)[1:] == (plain.decoded.telemetry.tobytes(), plain.decoded.targets.tobytes())
    assert parse_plain_predict(body, model, 3) is None
    with pytest.raises(ServiceError):
        decode_predict(body, model, 3)


@pytest.mark.slow
def test_large_body_is_decoded_in_one_pass(model: Model) -> None:
    """A plain body of several MiB, as bytes or view, equals the result of the schemas."""
    rows = np.random.default_rng(0).normal(500, 100, (WINDOW, CHANNELS)).round(3).tolist()
    instances: list[dict[str, Any]] = [{"telemetry": rows[: 1 + k % WINDOW], "cycle": k} for k in range(400)]
    instances[200]["engine_id"] = "}, {"  # looks like the end of an instance
    for indent in (None, 1):
        body = json.dumps({"instances": instances}, indent=indent).encode()
        assert len(body) > 2 * PARSE_BYTES
        for form in (body, memoryview(bytearray(body))):
            plain = parse_plain_predict(form, model, 400)
            assert plain is not None
            assert [(flight.engine_id, flight.cycle) for flight in plain.keys] == parse_by_schemas(body, model)[0]
            assert parse_by_schemas(body, model)[1] == plain.decoded.telemetry.tobytes()
            assert parse_plain_predict(form, model, 399) is None


@pytest.mark.parametrize(
    ("end", "wrong"),
    [(b"]}", b",]}"), (b"]}", b"}]}"), (b"]}", b"]]}"), (b"]}", b'],"more":[{}]}'), (b"},", b"},,"), (b"},", b"},[],")],
)
def test_fast_parser_declines_malformed_large_bodies(model: Model, end: bytes, wrong: bytes) -> None:
    """The fast parser declines a large body with an error between, within or after its instances."""
    instance = {"telemetry": [[1.0] * CHANNELS] * WINDOW}
    body = json.dumps({"instances": [instance] * 400}).encode()
    assert parse_plain_predict(body, model, 400) is not None
    for at in {body.rindex(end), body.index(end)}:
        assert parse_plain_predict(body[:at] + wrong + body[at + len(end) :], model, 401) is None


@pytest.mark.parametrize("rest", ["}", ',"missing":"hold"}', ',"temperature":2}'])
def test_decoded_request_does_not_keep_its_body(model: Model, rest: str) -> None:
    """A decoded request has no view of its body, so that the memory can be reused."""
    rows = [[1.0] * CHANNELS] * WINDOW
    text = f'{{"instances":{json.dumps([{"telemetry": rows, "engine_id": "a", "label": [0, 0, 1]}] * 100)}{rest}'
    body = memoryview(bytearray(text.encode()))
    request = decode_predict(body, model, 100)
    body.release()  # raises BufferError if a view of the body exists
    assert len(request.instances) == 100
