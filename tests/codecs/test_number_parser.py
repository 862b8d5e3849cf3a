"""Both parsers convert JSON numbers to equal arrays, and decline the same texts."""

import json
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.evaluation.evaluate import ARTEFACT
from service.api.evaluate import evaluate_logits
from service.codecs import json_numbers
from service.codecs.json_numbers import parse_columns, parse_joint_rows, parse_numbers, parse_rows
from service.codecs.number_parser import (
    DECLINED,
    FLOAT32_LIMIT,
    PARSE_BYTES,
    NumberParser,
    PortableParser,
    SimdjsonParser,
    fits_float32,
    to_float32,
)
from service.codecs.oip_tensors import decode_inference
from service.codecs.predict_request import decode_evaluate, decode_predict
from service.errors import InputRejected
from service.inference.model_loader import open_model
from tests.support.processes import absent, running

pytestmark = pytest.mark.usefixtures("each_parser")
ROWS = np.random.default_rng(0).normal(500, 100, (PARSE_BYTES // 10, 3)).round(3)


@pytest.mark.slow
def test_long_tables_are_parsed_in_pieces() -> None:
    """Long tables by row, by column, flat or nested are parsed in pieces to the same numbers."""
    rows = json.dumps(ROWS.tolist()).encode()
    assert len(rows) > 2 * PARSE_BYTES
    table = parse_rows(rows, 3)
    assert table is not None
    assert np.array_equal(ROWS, table)
    by_name = json.dumps({name: ROWS[:, k].tolist() for k, name in enumerate("abc")}).encode()
    table = parse_columns(by_name, ("a", "b", "c"))
    assert table is not None
    assert np.array_equal(ROWS, table)
    for nested in (ROWS.ravel().tolist(), ROWS.tolist(), [[ROWS.tolist()]]):
        flat = parse_numbers(json.dumps(nested, indent=1).encode(), "d")
        assert flat is not None
        assert np.array_equal(ROWS.ravel(), flat)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, len(ROWS) // 2, len(ROWS) - 1])
@pytest.mark.parametrize("wrong", ["x", "1]", "[1]", "1,", "null", "true", '"1"', "1 2"])
def test_invalid_value_anywhere_in_a_long_table_is_detected(place: int, wrong: str) -> None:
    """A piece with an invalid value makes the parser decline the whole table."""
    rows = [f"[{a}, {b}, {c}]" for a, b, c in ROWS.tolist()]
    rows[place] = rows[place][:-1] + f"{wrong}]" if wrong == "x" else f"[1, 2, {wrong}]"
    assert parse_rows(f"[{', '.join(rows)}]".encode(), 3) is None
    flat = [str(value) for value in ROWS.ravel().tolist()]
    flat[3 * place] = wrong
    if wrong != "[1]":  # is flattened
        assert parse_numbers(f"[{', '.join(flat)}]".encode(), "d") is None


def parse_with_json(text: str) -> Any:
    """Return the result of Python's own parser, or None if it fails."""
    try:
        return json.loads(text)
    except ValueError:
        return None


@given(st.lists(st.sampled_from(["[", "]", ",", "1", "[1,2]", "[3]", "1,", " "]), max_size=12).map("".join))
def test_nested_lists_in_pieces_equal_the_json_parser(inside: str) -> None:
    """A list in pieces has the numbers of Python's parser, and is declined if that fails."""
    text = f"[[1,{inside}],2]"
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 2, 5):
            patch.setattr(json_numbers, "PARSE_BYTES", size)
            numbers = parse_numbers(text.encode(), "d")
            assert isinstance(parse_with_json(text), list) == (numbers is not None)
            if numbers is not None:
                assert re.findall(r"\d+", text) == [str(int(value)) for value in numbers.tolist()]


PARTS = st.sampled_from(
    ["[1,2]", "[3,4],[5,-0.0]", "[6,7]],0,[[8,9]", "[1,[2]]", "0", "[1e39,2]", "null", "{}", "[", "]", ",", ",0,", " "]
)


@given(st.lists(st.lists(PARTS, max_size=5).map("".join) | st.just("[8,9]"), min_size=1, max_size=4))
@example(["[8,9]", "[1e39,2]"])
@example(["[8,9]", "[1,[2]]", "[8,9]"])
@example(["[8,9]", "[1,2],[3", "4]"])
def test_tables_parsed_together_equal_tables_alone(texts: list[str]) -> None:
    """Tables parsed together equal each table alone, or are all declined."""
    texts = [f"[{text}]" for text in texts]
    alone = [parse_rows(text.encode(), 2) for text in texts]
    single = [None if table is None else to_float32(table) for table in alone]
    together = parse_joint_rows([text.encode() for text in texts], 2)
    assert (together is None) == any(table is None for table in single)
    for table, own in zip([] if together is None else together, single, strict=together is not None):
        assert own is not None
        assert table.tobytes() == own.tobytes()
        assert table.shape == own.shape


ROW = f"[{','.join(['1.5'] * 17)}]"
WINDOW = f"[{','.join([ROW] * 100)}]"
NEARLY_NULL = f"[1e300,{'1,' * 15}0.{'0' * 290}null]"
PAD, GARBAGE = " " * PARSE_BYTES, "[@@" + " x" * 4096 + "]"
TENSOR = '{"inputs":[{"name":"telemetry","datatype":"FP32","shape":[1,100,17],"parameters":{"data":%s},"data":%s}]}'


@pytest.mark.parametrize(
    "wrong", ["[]", "[[1,2]]", f"[{ROW}", f"{WINDOW},0,{WINDOW}", "0", f"[[{'1,' * 16}[1]]]", "null"]
)
@pytest.mark.parametrize("place", [0, 7, 19])
def test_faults_of_a_window_do_not_depend_on_others(wrong: str, place: int) -> None:
    """Windows that are parsed together get the same faults as each one alone, with its location."""
    model = open_model(ARTEFACT, batch_rows=1)

    def refusal(windows: list[str]) -> str:
        text = ",".join(f'{{"telemetry":{window}}}' for window in windows)
        with pytest.raises(InputRejected) as refused:
            decode_predict(f'{{"instances":[{text}],"temperature":1}}'.encode(), model, 100)
        return refused.value.detail

    alone, among = refusal([wrong]), refusal([*[WINDOW] * place, wrong, *[WINDOW] * (19 - place)])
    if "the body" not in alone:  # such a message has the offset in bytes
        assert alone.replace("instances[0]", f"instances[{place}]") == among


def predicted(body: bytes | memoryview) -> None:
    decode_predict(body, open_model(ARTEFACT), 10)


def evaluated(body: bytes | memoryview) -> None:
    evaluate_logits(decode_evaluate(body, ("a", "b", "c"), 10))


def inferred(body: bytes | memoryview) -> None:
    decode_inference(body, None, {"telemetry": "FP32"})


@pytest.mark.parametrize(
    ("reads", "body"),
    [
        (predicted, f'{{"instances":[{{"telemetry":{GARBAGE},"telemetry":{WINDOW}}}]}}{PAD}'),
        (predicted, f'{{"instances":[{{"telemetry":{WINDOW}}},{{"telemetry":{ROW[:-1]},{PAD}]}}]}}'),
        (predicted, f'{{"instances":[{{"telemetry":[{ROW}{PAD},{NEARLY_NULL}]}}],"missing":"hold"}}'),
        (evaluated, f'{{"logits":{GARBAGE},"logits":[[1,2,3]],"labels":[0]}}{PAD}'),
        (inferred, TENSOR % (GARBAGE, WINDOW + PAD)),
        (inferred, TENSOR % ("[]", f"{WINDOW[:-1]}[]{PAD}]")),
        (inferred, TENSOR % ("[]", f"[[]{WINDOW}{PAD}]")),
        (inferred, TENSOR % ("[]", f"{WINDOW[:-1]},{PAD}]")),
    ],
)
def test_long_malformed_body_is_never_read(reads: Callable[[bytes | memoryview], None], body: str) -> None:
    """A malformed body is rejected in pieces as in whole, also in a value that a duplicate name replaces."""
    assert len(body) > PARSE_BYTES
    assert not isinstance(parse_with_json(body), dict)
    mapping = mmap.mmap(-1, len(body))
    mapping[:] = body.encode()
    for form in (body.encode(), memoryview(mapping)):
        with pytest.raises(InputRejected):
            reads(form)


def test_null_is_nan_only_where_it_may_be_held() -> None:
    """Null is NaN where missing values may be held, and the number of the sentinel is declined."""
    rows: list[list[float | None]] = [[1.0, None, 2.0], [None, 3.0, 4.0]]
    text = json.dumps(rows).encode()
    table = parse_rows(text, 3, hold=True)
    assert table is not None
    assert [[False, True, False], [True, False, False]] == np.isnan(table).tolist()
    assert to_float32(table) is None
    held = to_float32(table, missing=True)
    assert held is not None
    assert np.array_equal(held, np.array([[1, np.nan, 2], [np.nan, 3, 4]], np.float32), equal_nan=True)
    assert parse_rows(text, 3) is None
    assert parse_rows(text.replace(b"4.0", json_numbers.NULL_SENTINEL), 3, hold=True) is None


def test_float32_limit_equals_that_of_numpy() -> None:
    """Around the largest float32 both checks agree with the cast of NumPy."""
    for value in (FLOAT32_LIMIT, np.nextafter(FLOAT32_LIMIT, 0), 3.4e38, 1e39, float(np.finfo(np.float32).max), 0.0):
        for signed in (float(value), -float(value)):
            with np.errstate(over="ignore"):
                fits = bool(np.isfinite(np.float32(signed)))
            assert fits == fits_float32(signed)
            assert fits == (to_float32(np.array([signed])) is not None)
    assert not fits_float32(float("nan"))
    assert not fits_float32(10**400)


NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**66), 2**66).map(str),
    st.sampled_from(
        [
            *("0", "-0", "-0.0", "1e39", "1E400", "1e-400", "5e-324", "01", "1.", ".5", "+1", "-", "NaN", "Infinity"),
            *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809"),
            *("18446744073709551615", "18446744073709551616", "18446744073709551616.0", "1e19", "-1e19", "1.0", "2.5"),
            *("9007199254740993", "0.12345678901234567890123", "1e-12345678901234567890", "1" * 5000, "null", "true"),
            *('"1"', "{}", "[]", "[1]", "[[2],3]", "", " ", '{"a":1}', '"\\ud800"'),
        ]
    ),
)


def outcome(parse: Callable[[], Any]) -> Any:
    """Return the result with arrays as bytes, so that -0.0 is not 0.0; None if the parser declines."""
    try:
        result = parse()
    except DECLINED:
        return None
    return [part.tobytes() if isinstance(part, np.ndarray) else part for part in (*result,)]


@given(st.lists(NUMBERS, max_size=4), st.lists(NUMBERS, min_size=2, max_size=2), st.sampled_from(["%s", "[%s]"]))
@example(["-0"], ["-0", "1"], "%s")
def test_both_parsers_return_equal_numbers(values: list[str], pair: list[str], form: str) -> None:
    """Both parsers return equal bits for flat lists, rows and tables, or both decline."""
    simdjson, portable = SimdjsonParser(), PortableParser()
    flat, rows = f"[{form % ','.join(values)}]".encode(), f"[[{','.join(pair)}],[1,2]]".encode()

    def calls(parser: NumberParser) -> list[Any]:
        return [
            outcome(lambda: [parser.flat(flat, "d")]),
            outcome(lambda: [parser.flat(flat, "i")]),
            outcome(lambda: parser.rows(rows, 2)),
            outcome(lambda: parser.tables(b"[%b,0,[[1,2]],0]" % rows, 2)),
        ]

    pairs = list(zip(calls(simdjson), calls(portable), strict=True))
    nested = b"[" in rows[2:-7]  # simdjson flattens a list within a row; the caller counts brackets
    for one, other in pairs[: 2 if nested else 4]:
        assert one == other


@given(st.lists(NUMBERS, max_size=2), NUMBERS, NUMBERS)
@example(["0", "0"], "1", "-9223372036854775809")
@example(["0", "0"], "18446744073709551616", "1")
@example(["0", "0"], "1" * 5000, "1")
def test_both_parsers_return_equal_instances(values: list[str], engine: str, cycle: str) -> None:
    """Both parsers return equal instances with engines and cycles, or both decline."""
    text = f'[{{"telemetry":[[{",".join(values)}]],"engine_id":{engine},"cycle":{cycle}}}]'.encode()
    results: list[Any] = []
    for parser in (SimdjsonParser(), PortableParser()):
        try:
            parse_with_json = parser.instances(text, 2)
            keys = [key if isinstance(key, str | int) else type(key) is float for key in parse_with_json.keys[0]]
            results.append((keys, parse_with_json.lengths, [part.tobytes() for part in parse_with_json.numbers]))
        except DECLINED:
            results.append(None)
    if text.count(b"[") == 3:  # as above: no list within a row
        assert results[0] == results[1]


@pytest.mark.parametrize("depth", [900, 1000, 1030, 250_000])
@pytest.mark.parametrize("parser", [SimdjsonParser, PortableParser])
def test_deep_lists_are_declined_or_flattened(parser: type[NumberParser], depth: int) -> None:
    """Nested lists of any depth are one number or declined, and no parser overflows the stack."""
    text = b"[" * depth + b"1" + b"]" * depth
    result = outcome(lambda: [parser().flat(text, "d")])
    assert result == (None if depth > 1024 else [np.float64(1).tobytes()])


def test_service_without_simdjson_returns_the_same_bytes(tmp_path: Path) -> None:
    """Without simdjson the bytes of predictions, evaluations and rejections are the same."""
    row = json.dumps([round(500 + k / 7, 3) for k in range(17)])
    window = f"[{','.join([row] * 100)}]"
    bodies = (
        ("/v1/predict", f'{{"instances":[{{"telemetry":{window},"engine_id":"a","cycle":3}}]}}'),
        ("/v1/predict", f'{{"instances":[{",".join([f"""{{"telemetry":{window}}}"""] * 150)}]}}'),
        ("/v1/predict", f'{{"instances":[{{"telemetry":[{row}],"label":0}}],"temperature":2}}'),
        ("/v1/predict", f'{{"instances":[{{"telemetry":[{row},{row.replace("500.0", "null")}]}}],"missing":"hold"}}'),
        ("/v1/predict", f'{{"instances":[{{"telemetry":[{row.replace("500.0", "1e39")}]}}]}}'),
        ("/v1/evaluate", '{"logits":[[1,2.5,-3],[0,1e19,18446744073709551616]],"labels":[0,1]}'),
        ("/v2/models/engine-health/infer", TENSOR % ("[1]", window)),
        ("/v2/models/engine-health/infer", TENSOR % ("[1]", window.replace("500.0", "18446744073709551616"))),
    )
    stateless = {"ENGINE_HEALTH_DATABASE_URL": ""}
    with running(**stateless) as usual, running(**stateless, **absent(tmp_path, "simdjson")) as other:
        for path, body in bodies:
            pair = [one.client.post(path, content=body.encode()) for one in (usual, other)]
            masked = [re.sub(r'"prediction_id":"[^"]*"|"request_id":"[^"]*"', "", answer.text) for answer in pair]
            assert (pair[0].status_code, masked[0]) == (pair[1].status_code, masked[1]), path


def test_decoded_tensor_does_not_keep_its_body() -> None:
    """A decoded tensor has no view of its body, so that the memory can be reused."""
    body = memoryview(bytearray((TENSOR % ("[1]", WINDOW)).encode()))
    inference = decode_inference(body, None, {"telemetry": "FP32"})
    body.release()  # raises BufferError if a view of the body exists
    assert inference.inputs["telemetry"].shape == (1, 100, 17)
