import json
import mmap
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.evaluate import ARTEFACT
from service.api import numbers as arrays
from service.api.calls import evaluate_json, read_predict
from service.api.cuts import LONG, Cuts, cut
from service.api.held import Sent
from service.api.numbers import FLOAT32_MOST, PIECE, columns, fits_float32, numbers, table, tables, to_float32
from service.api.tensors import read
from service.errors import InputRejected
from service.runtime import open_model

NAMES = {b"telemetry", b"data", b"a", b"b"}
ROWS = np.random.default_rng(0).normal(500, 100, (PIECE // 10, 3)).round(3)


def placed(body: bytes) -> Sent:
    """The same as it lies in memory that is no object of bytes."""
    place = mmap.mmap(-1, len(body))
    place[:] = body
    return place


def mended(body: Sent) -> bytes:
    """What was cut out put back."""
    left, cuts = cut(body, NAMES)
    short = bytes(left)
    for mark, found in cuts.items():
        assert 1 == short.count(mark)
        short = short.replace(mark, bytes(found))
    return short


def long(value: float = 1.5) -> list[list[float]]:
    """A list that is worth cutting."""
    return [[value] * 10] * (LONG // 30)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("body", "lists"),
    [
        ({"instances": [{"telemetry": long()}, {"telemetry": long(2.5), "engine_id": "a"}]}, 2),
        ({"instances": [{"cycle": 1, "telemetry": {"a": long(), "b": long()}}], "missing": "hold"}, 2),
        ({"inputs": [{"name": "telemetry", "data": long()}]}, 1),
        ({"instances": [{"telemetry": [[1.0]]}]}, 0),
        ({"others": long()}, 0),
        ({"telemetry": "x" * 2 * LONG}, 0),
        ({"telemetry": {"nothing": {}}, "padded": " " * 2 * LONG}, 0),
    ],
)
def test_long_lists_are_cut_out_and_nothing_is_lost(body: Any, lists: int, indent: int | None) -> None:
    """Lists of numbers under known names become marks; put back they are the body, to the byte; the rest is JSON."""
    text = json.dumps(body, indent=indent).encode()
    short, cuts = cut(text, NAMES)
    assert lists == len(cuts)
    assert json.loads(bytes(short)).keys() == body.keys()
    assert all(isinstance(json.loads(bytes(found)), list) for found in cuts.values())
    assert text == mended(text) == mended(placed(text))


@given(st.text('[]{},:"0 \\\n', max_size=40), st.text('[]{},:"0 \n', max_size=40))
def test_whatever_surrounds_a_list_nothing_is_lost(before: str, after: str) -> None:
    """However broken a body is, what was cut out put back is the body."""
    text = f'{before}"telemetry":{json.dumps(long())}{after}'.encode()
    assert text == mended(text) == mended(placed(text))


def test_long_tables_are_what_short_ones_are() -> None:
    """Rows read in pieces are the rows; by rows, by columns, flat or nested."""
    rows = json.dumps(ROWS.tolist()).encode()
    assert len(rows) > 2 * PIECE
    found = table(rows, 3)
    assert found is not None
    assert np.array_equal(ROWS, found)
    by_name = json.dumps({name: ROWS[:, k].tolist() for k, name in enumerate("abc")}).encode()
    for body, cuts in ((by_name, Cuts()), cut(by_name, {b"a", b"b", b"c"})):
        found = columns(bytes(body), ("a", "b", "c"), cuts)
        assert found is not None
        assert np.array_equal(ROWS, found)
    for nested in (ROWS.ravel().tolist(), ROWS.tolist(), [[ROWS.tolist()]]):
        flat = numbers(json.dumps(nested, indent=1).encode(), "d")
        assert flat is not None
        assert np.array_equal(ROWS.ravel(), flat)


@pytest.mark.parametrize("place", [0, len(ROWS) // 2, len(ROWS) - 1])
@pytest.mark.parametrize("wrong", ["x", "1]", "[1]", "1,", "null", "true", '"1"', "1 2"])
def test_a_wrong_value_anywhere_in_a_long_table_is_seen(place: int, wrong: str) -> None:
    """A piece with anything but numbers in it makes the whole unusual."""
    rows = [f"[{a}, {b}, {c}]" for a, b, c in ROWS.tolist()]
    rows[place] = rows[place][:-1] + f"{wrong}]" if wrong == "x" else f"[1, 2, {wrong}]"
    assert table(f"[{', '.join(rows)}]".encode(), 3) is None
    flat = [str(value) for value in ROWS.ravel().tolist()]
    flat[3 * place] = wrong
    if wrong != "[1]":  # which is flattened
        assert numbers(f"[{', '.join(flat)}]".encode(), "d") is None


def parsed(text: str) -> Any:
    """As Python's own parser reads it; None if it does not."""
    try:
        return json.loads(text)
    except ValueError:
        return None


@given(st.lists(st.sampled_from(["[", "]", ",", "1", "[1,2]", "[3]", "1,", " "]), max_size=12).map("".join))
def test_nested_lists_in_pieces_are_read_if_and_only_if_they_are_json(inside: str) -> None:
    """A list that is cut at its commas has the numbers that Python's parser finds, and is refused where that does."""
    text = f"[[1,{inside}],2]"
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 2, 5):
            patch.setattr(arrays, "PIECE", size)
            found = numbers(text.encode(), "d")
            assert isinstance(parsed(text), list) == (found is not None)
            if found is not None:
                assert re.findall(r"\d+", text) == [str(int(value)) for value in found.tolist()]


PARTS = st.sampled_from(
    ["[1,2]", "[3,4],[5,-0.0]", "[6,7]],0,[[8,9]", "[1,[2]]", "0", "[1e39,2]", "null", "{}", "[", "]", ",", ",0,", " "]
)


@given(st.lists(st.lists(PARTS, max_size=5).map("".join) | st.just("[8,9]"), min_size=1, max_size=4))
@example(["[8,9]", "[1e39,2]"])
@example(["[8,9]", "[1,[2]]", "[8,9]"])
@example(["[8,9]", "[1,2],[3", "4]"])
def test_tables_read_together_are_what_each_is_by_itself(texts: list[str]) -> None:
    """Whatever stands between the brackets, some that fit those of a neighbour too: all as if alone, or none."""
    texts = [f"[{text}]" for text in texts]
    alone = [table(text.encode(), 2) for text in texts]
    single = [None if found is None else to_float32(found) for found in alone]
    together = tables([text.encode() for text in texts], 2)
    assert (together is None) == any(found is None for found in single)
    for found, own in zip([] if together is None else together, single, strict=together is not None):
        assert own is not None
        assert found.tobytes() == own.tobytes()
        assert found.shape == own.shape


ROW = f"[{','.join(['1.5'] * 17)}]"
WINDOW = f"[{','.join([ROW] * 100)}]"
NEARLY_NULL = f"[1e300,{'1,' * 15}0.{'0' * 290}null]"
PAD, GARBAGE = " " * PIECE, "[@@" + " x" * LONG + "]"
TENSOR = '{"inputs":[{"name":"telemetry","datatype":"FP32","shape":[1,100,17],"parameters":{"data":%s},"data":%s}]}'


@pytest.mark.parametrize(
    "wrong", ["[]", "[[1,2]]", f"[{ROW}", f"{WINDOW},0,{WINDOW}", "0", f"[[{'1,' * 16}[1]]]", "null"]
)
@pytest.mark.parametrize("place", [0, 7, 19])
def test_a_wrong_window_among_many_is_refused_in_its_own_words(wrong: str, place: int) -> None:
    """Windows are read several at a time; what is said of one is what is said of it alone, with its place."""
    model = open_model(ARTEFACT, batch_rows=1)

    def refusal(windows: list[str]) -> str:
        told = ",".join(f'{{"telemetry":{window}}}' for window in windows)
        with pytest.raises(InputRejected) as refused:
            read_predict(f'{{"instances":[{told}],"temperature":1}}'.encode(), model, 100)
        return refused.value.detail

    alone, among = refusal([wrong]), refusal([*[WINDOW] * place, wrong, *[WINDOW] * (19 - place)])
    if "the body" not in alone:  # which names a byte
        assert alone.replace("instances[0]", f"instances[{place}]") == among


def predicted(body: bytes) -> None:
    read_predict(body, open_model(ARTEFACT), 10)


def evaluated(body: bytes) -> None:
    evaluate_json(body, ("a", "b", "c"), 10)


def inferred(body: bytes) -> None:
    read(body, None, {"telemetry": "FP32"})


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
def test_a_long_body_that_is_no_json_is_never_read(reads: Callable[[bytes], None], body: str) -> None:
    """What a parser refuses whole is refused in pieces, also in a place that nobody reads."""
    assert len(body) > PIECE
    assert not isinstance(parsed(body), dict)
    with pytest.raises(InputRejected):
        reads(body.encode())


def test_missing_values_are_read_as_fast_as_others_and_only_where_they_may() -> None:
    """Null is NaN where it may be held, whatever other numbers there are; a number of the same size is none."""
    rows: list[list[float | None]] = [[1.0, None, 2.0], [None, 3.0, 4.0]]
    text = json.dumps(rows).encode()
    found = table(text, 3, hold=True)
    assert found is not None
    assert [[False, True, False], [True, False, False]] == np.isnan(found).tolist()
    assert to_float32(found) is None
    held = to_float32(found, missing=True)
    assert held is not None
    assert np.array_equal(held, np.array([[1, np.nan, 2], [np.nan, 3, 4]], np.float32), equal_nan=True)
    assert table(text, 3) is None
    assert table(text.replace(b"4.0", arrays.MISSING), 3, hold=True) is None


def test_what_fits_in_a_float32_is_what_numpy_says() -> None:
    """Around the largest float32, to the last bit of a float64, both ways of looking agree with the cast."""
    for value in (FLOAT32_MOST, np.nextafter(FLOAT32_MOST, 0), 3.4e38, 1e39, float(np.finfo(np.float32).max), 0.0):
        for signed in (float(value), -float(value)):
            with np.errstate(over="ignore"):
                fits = bool(np.isfinite(np.float32(signed)))
            assert fits == fits_float32(signed)
            assert fits == (to_float32(np.array([signed])) is not None)
    assert not fits_float32(float("nan"))
    assert not fits_float32(10**400)
