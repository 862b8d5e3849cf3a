import gzip
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from model.contract import CHANNELS
from model.windows import Readings
from service.codecs.arrow_limits import MAX_HEADER_BYTES, UINT32, FlatbufferTable, read_number
from tests.support.models import identity_classifier, overflowing_classifier
from tests.support.processes import Service, absent, running
from tests.support.tables import ARROW, flights, stream

ROOT = Path(__file__).parents[2]
TEXTS = {
    "string": lambda column: column,
    "large_string": lambda column: column.cast(pa.large_string()),
    "string_view": lambda column: column.cast(pa.string_view()),
    "dictionary": lambda column: column.dictionary_encode(),
}


def post(service: Service, body: bytes, query: str = "", **headers: str) -> httpx.Response:
    return service.client.post(f"/v1/predict{query}", content=body, headers=ARROW | headers)


def predict_table(service: Service, body: bytes, query: str = "") -> dict[str, Any]:
    """Return the response without fields that differ between calls: ids, and results of repeated labels."""
    answer = post(service, body, query)
    assert answer.status_code == 200, answer.text
    return without_ids(answer.json())


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    response.pop("results", None)
    for row in response["predictions"]:
        row.pop("prediction_id")
    return response


def set_column(table: Any, name: str, values: Any) -> Any:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.fixture(scope="module")
def fleet(windows: Readings) -> dict[str, Readings]:
    """Three engines: one full window, one short history, and one with more rows than the window."""
    return {"B": windows[0], "A": windows[1][:7], "C": np.concatenate([windows[3][:30], windows[2]])}


def test_table_of_flights_equals_json(service: Service, fleet: dict[str, Readings]) -> None:
    """Rows and columns in any order give bit for bit the predictions of the same windows in JSON."""
    table = flights(fleet, label=pa.array([*["critical"] * 99, None, *["critical"] * 6, "normal", *[None] * 130]))
    instances = [
        {"engine_id": name, "cycle": len(history), "telemetry": history.tolist()} for name, history in fleet.items()
    ]
    instances[1]["label"] = "normal"
    expected = without_ids(service.predict(instances))
    assert expected == predict_table(service, stream(table))
    shuffled = np.concatenate([[0, 100, 107], np.random.default_rng(0).permutation(np.arange(1, 237))])
    order = list(dict.fromkeys(shuffled.tolist()))
    mixed = table.take(order).select(sorted(table.column_names))
    assert expected == predict_table(service, stream(mixed, rows=10))
    assert [("B", 100), ("A", 7), ("C", 130)] == [(row["engine_id"], row["cycle"]) for row in expected["predictions"]]
    assert 1 == expected["evaluation"]["count"]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("text", TEXTS)
def test_table_encodings_give_equal_predictions(
    service: Service, fleet: dict[str, Readings], text: str, compression: str | None
) -> None:
    """Tables of any string layout, batch size and compression give equal predictions."""
    table = flights(fleet, label=pa.array(["degrading"] * 237))
    expected = predict_table(service, stream(table))
    for name in ("engine_id", "label"):
        table = set_column(table, name, TEXTS[text](table.column(name)))
    assert expected == predict_table(service, stream(table, 25, compression))


def test_numbers_of_every_width_are_read(service: Service, windows: Readings) -> None:
    """Columns of any numeric type equal the same numbers in JSON, and labels may be indices of any width."""
    whole = np.round(windows[0][:9]).clip(0, 120).astype(np.float32)
    expected = without_ids(service.predict([{"telemetry": whole.tolist(), "label": 2, "engine_id": "A", "cycle": 9}]))
    kinds = [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]
    for kind in (*kinds, pa.float16(), pa.float32(), pa.float64()):
        table = flights({"A": whole.astype(np.float16)})
        for name in CHANNELS:
            table = set_column(table, name, table.column(name).cast(kind))
        integer = kind if kind in kinds else pa.int16()
        table = set_column(table, "cycle", table.column("cycle").cast(integer))
        table = table.append_column("label", pa.array([None] * 8 + [2], integer))
        assert expected == predict_table(service, stream(table)), kind
    large = 2**53 + 1 + np.arange(9, dtype=np.int64)
    table = set_column(flights({"A": whole}), "sensor_4", pa.array(large))
    telemetry = [[*row[:5], int(value), *row[6:]] for row, value in zip(whole.tolist(), large, strict=True)]
    expected = service.predict([{"telemetry": telemetry, "engine_id": "A", "cycle": 9}])
    assert without_ids(expected) == predict_table(service, stream(table))


def test_table_without_optional_columns_is_accepted(service: Service, windows: Readings) -> None:
    """Without engine_id a table is one engine, and without cycle its rows are in order."""
    expected = service.predict([{"telemetry": windows[0].tolist()}])["predictions"][0]
    table = flights({"A": windows[0]})
    anonymous = predict_table(service, stream(table.drop(["engine_id", "cycle"])))["predictions"]
    assert [(expected["logits"], None, None)] == [(x["logits"], x["engine_id"], x["cycle"]) for x in anonymous]
    backwards = table.take(list(range(99, -1, -1)))
    by_cycle = predict_table(service, stream(backwards.drop(["engine_id"])))["predictions"][0]
    assert expected["logits"] == by_cycle["logits"]
    other = predict_table(service, stream(backwards.drop(["cycle"])))["predictions"][0]
    assert ("A", None) == (other["engine_id"], other["cycle"])
    turned = service.predict([{"telemetry": windows[0][::-1].tolist()}])["predictions"][0]
    assert expected["logits"] != turned["logits"] == other["logits"]


def test_options_of_a_table_are_in_the_query(service: Service, fleet: dict[str, Readings]) -> None:
    """Temperature and explanation of a table are set in the query, with the effect that they have in JSON."""
    table = stream(flights(fleet).drop(["cycle"]))
    instances = [{"engine_id": name, "telemetry": history.tolist()} for name, history in fleet.items()]
    for query, options in (
        ("?temperature=2", {"temperature": 2}),
        ("?explain=true", {"explain": True}),
        ("?temperature=0.5&missing=reject&explain=false", {"temperature": 0.5}),
    ):
        assert without_ids(service.predict(instances, **options)) == predict_table(service, table, query)


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("?temperature=0", "temperature"),
        ("?temperature=nan", "temperature"),
        ("?temperature=inf", "temperature"),
        ("?temperature=warm", "temperature"),
        ("?temperature=", "temperature"),
        ("?temperature=1&temperature=2", "temperature"),
        ("?missing=guess", "missing"),
        ("?explain=maybe", "explain"),
        ("?%ff=1", "\ufffd"),
        ("?temprature=2", "temprature"),
        ("?instances=1", "instances"),
    ],
)
def test_invalid_option_is_located(service: Service, windows: Readings, query: str, place: str) -> None:
    """Options that are invalid, unknown or duplicate get 422 with their name."""
    answer = post(service, stream(flights({"A": windows[0]})), query)
    assert (422, [place]) == (answer.status_code, answer.json()["errors"][0]["loc"])
    assert ("&" in query) == answer.json()["detail"].startswith("duplicate query parameter temperature")


def test_missing_values_are_rejected_or_imputed(service: Service, fleet: dict[str, Readings]) -> None:
    """Null and NaN are rejected by instance, row and channel, or imputed and counted, as null in JSON."""
    table, history = flights(fleet), fleet["A"].tolist()
    row = 100 + 5  # the sixth row of engine A
    for gone in (None, float("nan")):
        values = table.column("sensor_4").to_pylist()
        values[row] = gone
        holed = stream(set_column(table, "sensor_4", pa.array(values, pa.float32(), from_pandas=False)))
        answer = post(service, holed)
        assert (422, [["instances", 1, "telemetry", 5, "sensor_4"]]) == (
            answer.status_code,
            [error["loc"] for error in answer.json()["errors"]],
        )
        name = 'engine_health_imputed_values_total{channel="sensor_4"}'
        before = service.metrics().get(name, 0)
        held = predict_table(service, holed, "?missing=hold")["predictions"][1]
        assert before + 1 == service.metrics()[name]
        rows = [*history[:5], [*history[5][:5], None, *history[5][6:]], history[6]]
        rest = [{"telemetry": other.tolist()} for other in (fleet["B"], fleet["C"])]
        in_json = service.predict([rest[0], {"telemetry": rows}, rest[1]], missing="hold")["predictions"][1]
        assert in_json["logits"] == held["logits"]
    first = stream(set_column(table, "sensor_4", pa.array([None, *table.column("sensor_4").to_pylist()[1:]])))
    answer = post(service, first, "?missing=hold")
    assert (422, ["instances", 0, "telemetry", 0, "sensor_4"]) == (
        answer.status_code,
        answer.json()["errors"][0]["loc"],
    )


SMALL = 5  # rows of engine A in the tables below


def numbers(*values: Any) -> Any:
    return pa.array(values)


WRONG: list[tuple[str, Any, list[Any]]] = [
    ("sensor_4", None, ["sensor_4"]),
    ("sensor_99", numbers(1.0, 2.0, 3.0, 4.0, 5.0), ["sensor_99"]),
    ("sensor_4", numbers("1", "2", "3", "4", "5"), ["sensor_4"]),
    ("sensor_4", numbers(True, True, False, True, True), ["sensor_4"]),
    ("sensor_4", pa.nulls(SMALL), ["sensor_4"]),
    ("sensor_4", numbers(1, 2, 3, 4, 5).dictionary_encode(), ["sensor_4"]),
    ("sensor_4", numbers([1.0], [2.0], [3.0], [4.0], [5.0]), ["sensor_4"]),
    ("sensor_4", numbers(1.0, 1e39, 3.0, 4.0, 5.0), ["instances", 0, "telemetry", 1, "sensor_4"]),
    ("sensor_4", numbers(1.0, 2.0, 3.0, float("-inf"), 5.0), ["instances", 0, "telemetry", 3, "sensor_4"]),
    ("engine_id", numbers(1, 2, 3, 4, 5), ["engine_id"]),
    ("engine_id", numbers("A", "A", None, "A", "A"), ["engine_id", 2]),
    ("engine_id", numbers("A", "A", None, "A", "A").dictionary_encode(), ["engine_id", 2]),
    ("engine_id", numbers("A", "A", "A", "", "A"), ["engine_id", 3]),
    ("engine_id", numbers("A", "A" * 201, "A", "A", "A"), ["engine_id", 1]),
    ("cycle", numbers(1.0, 2.0, 3.0, 4.0, 5.0), ["cycle"]),
    ("cycle", numbers(1, 2, 3, None, 5), ["cycle", 3]),
    ("cycle", numbers(1, 2, 3, -4, 5), ["cycle", 3]),
    ("cycle", numbers(1, 2, 2**53 + 1, 4, 5), ["cycle", 2]),
    ("cycle", numbers(1, 2, 3, 4, 2), ["instances", 0, "cycle"]),
    ("label", numbers(1.0, 1.0, 1.0, 1.0, 1.0), ["label"]),
    ("label", numbers("a", "a", "a", "a", "healthy"), ["instances", 0, "label"]),
    ("label", numbers(0, 0, 0, 0, 3), ["instances", 0, "label"]),
    ("label", numbers(0, 0, 0, 0, -1), ["instances", 0, "label"]),
]


@pytest.mark.parametrize(("name", "values", "place"), WRONG, ids=[f"{k}" for k in range(len(WRONG))])
def test_invalid_column_is_located(
    service: Service, windows: Readings, name: str, values: Any, place: list[Any]
) -> None:
    """A missing, unknown, mistyped or out-of-range column gets a problem document with column and row."""
    table = flights({"A": windows[0][:SMALL]})
    table = table.drop([name]) if name in table.column_names else table
    answer = post(service, stream(table if values is None else table.append_column(name, values)))
    assert (422, place) == (answer.status_code, answer.json()["errors"][0]["loc"]), answer.text
    assert "application/problem+json" == answer.headers["content-type"]


def test_duplicate_column_and_empty_table_get_422(service: Service, windows: Readings) -> None:
    """A duplicate column gets 422 with its name, and so does a table without rows."""
    table = flights({"A": windows[0][:SMALL]})
    twice = post(service, stream(table.append_column("sensor_4", table.column("sensor_4"))))
    assert (422, ["sensor_4"]) == (twice.status_code, twice.json()["errors"][0]["loc"])
    for empty in (stream(table.slice(0, 0)), stream(table.schema.empty_table())):
        answer = post(service, empty)
        assert (422, ["instances"]) == (answer.status_code, answer.json()["errors"][0]["loc"])


def test_body_that_is_no_stream_gets_400(service: Service, windows: Readings) -> None:
    """An empty body, noise, JSON, an Arrow file, a truncated stream and trailing bytes get 400."""
    body = stream(flights({"A": windows[0][:SMALL]}))
    sink = pa.BufferOutputStream()
    table = flights({"A": windows[0][:SMALL]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    cut = [body[:k] for k in range(1, len(body) - 8, 97)]  # the last 8 bytes of a stream are optional
    for wrong in (b"", b"\x00" * 64, os.urandom(999), b'{"instances": []}', bytes(sink.getvalue()), body + b"x", *cut):
        answer = post(service, wrong)
        assert (400, 400) == (answer.status_code, answer.json()["status"]), answer.text
    assert 200 == post(service, body[:-8]).status_code


def test_damaged_streams_are_rejected_without_effect(service: Service, fleet: dict[str, Readings]) -> None:
    """1000 streams with wrong bytes are answered or rejected, and the next valid stream is answered as before."""
    table = flights({name: history[:4] for name, history in fleet.items()}, label=pa.array(["normal"] * 12))
    coded = set_column(table, "engine_id", table.column("engine_id").dictionary_encode())
    viewed = set_column(table, "engine_id", table.column("engine_id").cast(pa.string_view()))
    bodies = [stream(table), stream(coded, 5), stream(viewed, 5), stream(coded, 5, "zstd"), stream(viewed, 5, "lz4")]
    expected, random = predict_table(service, bodies[0]), np.random.default_rng(0)
    extremes = [0, 1, 0x7F, 0x80, 0xFF]
    for k in range(1000):
        damaged = bytearray(bodies[k % len(bodies)])
        for place in random.integers(0, len(damaged), 1 + k % 3):
            damaged[place] = extremes[random.integers(5)] if k % 2 else damaged[place] ^ (1 << random.integers(8))
        assert post(service, bytes(damaged)).status_code in (200, 400, 413, 422)
    assert expected == predict_table(service, bodies[0])
    assert service.process.poll() is None


def headers(body: bytes) -> list[tuple[int, FlatbufferTable, int]]:
    """Return the offset of the header, the header and the offset of the body of each message."""
    messages, at = [], 0
    while at < len(body) and (size := read_number(UINT32, body, at + 4)):
        data = body[at + 8 : at + 8 + size]
        message = FlatbufferTable(data, read_number(UINT32, data, 0))
        messages.append((at + 8, message, at + 8 + size))
        at += 8 + size + message.number(3, struct.Struct("<q"))
    return messages


def share_longest_entry(body: bytes) -> bytes:
    """Return a stream in which every metadata entry refers to the longest one."""
    begin, message, _ = headers(body)[0]
    schema, changed = message.table(2), bytearray(body)
    assert schema is not None
    notes = [*schema.tables(2)]
    longest, (place, count) = max(notes, key=lambda note: note.vector(1, 1)[1]), schema.vector(2, 4)
    for k in range(count):
        if longest.position > place + 4 * k:  # offsets point forward only
            struct.pack_into("<I", changed, begin + place + 4 * k, longest.position - place - 4 * k)
    return bytes(changed)


def one_buffer(body: bytes) -> bytes:
    """Return a stream in which all columns of the first batch refer to the largest buffer."""
    begin, message, _ = headers(body)[1]
    batch, changed = message.table(2), bytearray(body)
    assert batch is not None
    place, count = batch.vector(2, 16)
    spans = [struct.unpack_from("<qq", message.data, place + 16 * k) for k in range(count)]
    for k, span in enumerate(spans):
        if span[1]:
            struct.pack_into("<qq", changed, begin + place + 16 * k, *max(spans, key=lambda span: span[1]))
    return bytes(changed)


def swollen(body: bytes, size: int) -> bytes:
    """Return a compressed stream whose first buffer declares another inflated size."""
    _, message, begin = headers(body)[1]
    batch, changed = message.table(2), bytearray(body)
    assert batch is not None
    place, count = batch.vector(2, 16)
    spans = [struct.unpack_from("<qq", message.data, place + 16 * k) for k in range(count)]
    struct.pack_into("<q", changed, begin + next(offset for offset, length in spans if length), size)
    return bytes(changed)


def peak(service: Service) -> int:
    """Return the peak memory of the service in MiB."""
    lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024


def bombs() -> dict[str, tuple[bytes, int]]:
    """Return small streams that need much memory, with the expected status."""
    zeros = pa.array(np.zeros(2**21))
    table = pa.table(dict.fromkeys(CHANNELS, zeros))  # 272 MiB of zeros
    bytes_ = pa.table({name: pa.array(np.ones(2**19, np.int8)) for name in CHANNELS})
    view = struct.pack("<i4sii", 2**20, b"xxxx", 0, 0)  # a text of 1 MiB, referred to 4,096 times
    buffers = [None, pa.py_buffer(view * 2**12), pa.py_buffer(b"x" * 2**20)]
    text = pa.Array.from_buffers(pa.string_view(), 2**12, buffers)
    views = pa.table({name: pa.array(np.ones(2**12, np.float32)) for name in CHANNELS}).append_column("engine_id", text)
    notes = {f"{k}": "" for k in range(9000)} | {"long": "x" * 400_000}
    few = pa.table({name: pa.array([1.0]) for name in CHANNELS})
    coded = few.append_column("engine_id", pa.array(["y" * 2**25]).dictionary_encode())
    return {
        "zstd": (stream(table, compression="zstd"), 413),
        "lz4": (stream(table, compression="lz4"), 413),
        "dictionary": (stream(coded, compression="zstd"), 413),
        "a size that is a lie": (swollen(stream(few, compression="lz4"), 2**62), 413),
        "a smaller lie": (swollen(stream(few, compression="zstd"), 2**24), 400),
        "a negative size": (swollen(stream(few, compression="zstd"), -2), 400),
        "one buffer": (one_buffer(stream(bytes_.append_column("cycle", pa.array(np.arange(2**19))))), 413),
        "views": (stream(views), 413),
        "notes": (share_longest_entry(stream(few.replace_schema_metadata(notes))), 400),
        "many columns": (stream(pa.table({f"{k}": pa.array([1.0]) for k in range(5000)})), 400),
        "a long header": (stream(few.replace_schema_metadata({"x": "x" * 2 * MAX_HEADER_BYTES})), 400),
        "many messages": (stream(pa.concat_tables([few] * 17_000), 1), 400),
    }


@pytest.mark.slow
def test_arrow_bombs_are_rejected_at_little_cost(windows: Readings) -> None:
    """Bombs of every kind are rejected with little memory, and the next stream is answered."""
    with running() as fresh:
        body = stream(flights({"A": windows[0]}))
        expected = predict_table(fresh, body)
        before = peak(fresh)
        for name, (bomb, status) in bombs().items():
            assert len(bomb) < 2**25, name
            answer = post(fresh, bomb)
            assert status == answer.status_code, (name, answer.text)
            assert expected == predict_table(fresh, body)
        assert peak(fresh) - before < 100


def test_table_with_too_many_engines_gets_422(service: Service, windows: Readings) -> None:
    """More engines than instances are allowed, with or without explanation, get 422; the maximum is answered."""
    few = {f"{k}": windows[0][:1] for k in range(241)}
    for query, status in (("", 200), ("?explain=true", 422)):
        answer = post(service, stream(flights(few)), query)
        assert status == answer.status_code
    assert ["instances"] == answer.json()["errors"][0]["loc"]
    answer = post(service, stream(flights({f"{k}": windows[0][:1] for k in range(4097)})))
    assert (422, ["instances"]) == (answer.status_code, answer.json()["errors"][0]["loc"])


def test_gzip_table_is_limited_by_its_inflated_size(windows: Readings) -> None:
    """A gzip stream equals its plain form, and one that exceeds the limit when inflated gets 413."""
    body = stream(flights({"A": np.round(windows[0], 1)}))
    with running(ENGINE_HEALTH_MAX_BODY_BYTES=str(len(body))) as small:
        packed = post(small, gzip.compress(body), **{"Content-Encoding": "gzip"})
        assert predict_table(small, body) == without_ids(packed.json())
        twice = flights({"A": windows[0].repeat(2, axis=0).round(1)})
        squeezed = stream(twice, compression="zstd")
        assert len(squeezed) < len(body) < len(stream(twice))
        assert 413 == post(small, squeezed).status_code


def loaded(process: "subprocess.Popen[str]", library: str) -> bool:
    """Return whether a process has loaded a library."""
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def test_pyarrow_is_loaded_by_the_first_table(windows: Readings) -> None:
    """A service imports pyarrow with its first table."""
    with running() as fresh:
        fresh.predict([{"telemetry": windows[0].tolist()}])
        assert not loaded(fresh.process, "libarrow")
        predict_table(fresh, stream(flights({"A": windows[0]})))
        assert loaded(fresh.process, "libarrow")
        assert not loaded(fresh.process, "pandas")


def test_table_without_pyarrow_gets_415(tmp_path: Path, windows: Readings) -> None:
    """Without pyarrow a table gets 415 with the name of the extra, and JSON is answered."""
    with running(**absent(tmp_path, "pyarrow")) as bare:
        answer = post(bare, stream(flights({"A": windows[0]})))
        assert 415 == answer.status_code
        assert "install the extra `tables`" in answer.json()["detail"]
        bare.predict([{"telemetry": windows[0].tolist()}])


def test_model_of_single_rows_takes_each_row(tmp_path: Path) -> None:
    """A model of single rows with named channels gives one prediction per row in the order of the rows."""
    described: dict[str, object] = {
        "name": "four",
        "version": "1",
        "classes": ["n", "e", "s", "w"],
        "channels": [{"name": name} for name in "abcd"],
    }
    path = identity_classifier(tmp_path / "four.onnx", described)
    columns = {"b": [0, 5, 0], "a": [1, 0, 0], "c": [0, 0, 0.5], "d": [0, 0, 2], "engine_id": ["y", "x", "y"]}
    table = pa.table(columns | {"cycle": [2, 1, 1], "label": ["n", None, "w"]})
    with running(ENGINE_HEALTH_MODEL=str(path)) as other:
        response = predict_table(other, stream(table))
        assert [[1, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0.5, 2]] == [row["logits"] for row in response["predictions"]]
        assert [("y", 2), ("x", 1), ("y", 1)] == [(row["engine_id"], row["cycle"]) for row in response["predictions"]]
        assert (2, 1.0) == (response["evaluation"]["count"], response["evaluation"]["accuracy"])
        holed = set_column(table, "d", pa.array([0.0, None, 2.0]))
        for query in ("", "?missing=hold"):
            answer = post(other, stream(holed), query)
            assert (422, ["instances", 1, "telemetry", "d"]) == (answer.status_code, answer.json()["errors"][0]["loc"])


def test_table_for_unnamed_channels_gets_415(tmp_path: Path) -> None:
    """A table for a model without named channels gets 415 with the reason."""
    with running(ENGINE_HEALTH_MODEL=str(overflowing_classifier(tmp_path / "over.onnx"))) as other:
        answer = post(other, stream(pa.table({"a": [1.0], "b": [2.0]})))
        assert 415 == answer.status_code
        assert "named channels" in answer.json()["detail"]


def test_live_while_a_large_table_is_read(service: Service, windows: Readings) -> None:
    """`/livez` responds while 30 MB of flights in small batches are read."""
    large = stream(flights({f"{k}": windows[k % 4] for k in range(2000)}).drop(["cycle"]), rows=20)
    assert 16 * 2**20 < len(large) < 32 * 2**20
    statuses = []
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=service.client.base_url, trust_env=False) as client:
        task = pool.submit(post, service, large)
        while not task.done():
            statuses.append(client.get("/livez").status_code)
        assert 2000 == len(task.result().json()["predictions"])
    assert {200} == set(statuses)
    assert len(statuses) > 5  # a blocked event loop would give one or two


def test_openapi_document_describes_tables(service: Service) -> None:
    """The OpenAPI document has both content types of a prediction and the options as query parameters."""
    operation = service.client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    assert {"application/json", ARROW["Content-Type"]} == set(operation["requestBody"]["content"])
    parameters = {parameter["name"]: parameter for parameter in operation["parameters"]}
    assert {"temperature", "missing", "explain"} == set(parameters)
    assert {"query"} == {parameter["in"] for parameter in parameters.values()}
    assert ["hold", "reject"] == sorted(parameters["missing"]["schema"]["enum"])


def test_python_program_of_the_api_page_works(service: Service, fleet: dict[str, Readings], tmp_path: Path) -> None:
    """The Python program of docs/api.md prints the health of each engine of flights.parquet."""
    program = (ROOT / "docs" / "api.md").read_text().split("```python\n")[1].split("```")[0]
    assert "pyarrow" in program
    pyarrow.parquet.write_table(flights(fleet), tmp_path / "flights.parquet")
    here = program.replace("http://127.0.0.1:8000", str(service.client.base_url).rstrip("/"))
    printed = subprocess.check_output([sys.executable, "-c", here], cwd=tmp_path, text=True)
    expected = predict_table(service, stream(flights(fleet)))["predictions"]
    assert [f"{row['engine_id']} {row['health']}" for row in expected] == printed.splitlines()
