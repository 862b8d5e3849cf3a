import json
import math
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy import create_engine

from benchmarks.kills import survive_in
from model import numerics
from model.contract import Manifest
from model.windows import Readings, pad_left
from service.codecs.requests import MAX_NAME_LENGTH
from service.codecs.store_requests import decode_cursor, encode_cursor
from service.store.sql.urls import parse_url
from tests.support.models import identity_classifier, window_classifier
from tests.support.postgres import Postgres, postgres
from tests.support.processes import Service, running, until, until_all_are_ready
from tests.support.raw_http import connected
from tests.support.stored import engines, fly, history, submit_labels

FOUR: dict[str, object] = {"name": "four", "version": "1", "classes": ["a", "b", "c", "d"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    with postgres() as started:
        yield started


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def stateful(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a store in SQLite or PostgreSQL."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('memory')}/memory.db"
    else:
        url = request.getfixturevalue("cluster").url("service")
    with running(ENGINE_HEALTH_DATABASE_URL=url) as service:
        yield service


def test_flight_prediction_equals_that_of_its_window(stateful: Service, windows: Readings, manifest: Manifest) -> None:
    """A flight gets bit for bit the prediction of the window of all flights up to its cycle."""
    window = manifest.window or 0
    flights = np.concatenate([windows[2], windows[0]])[: window + 20]
    for cycle, row in enumerate(flights):
        flown = fly(stateful, "bits", cycle, row)["predictions"][0]
        if cycle % 17 and cycle < window + 15:
            continue
        expected = stateful.predict([{"telemetry": pad_left(flights[: cycle + 1], window).tolist()}])["predictions"][0]
        assert ("bits", cycle) == (flown["engine_id"], flown["cycle"])
        assert (expected["logits"], expected["rul"], expected["probabilities"]) == (
            flown["logits"],
            flown["rul"],
            flown["probabilities"],
        )


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_flights_of_disconnected_clients_are_stored(stateful: Service, windows: Readings, how: int) -> None:
    """A flight that arrived completely is stored even if its client disconnects before the response."""
    name, count = f"departed-{how}", 20
    for cycle in range(count):
        flight = {"engine_id": name, "cycle": cycle, "telemetry": windows[0, cycle].tolist()}
        body = json.dumps({"cycles": [flight]}).encode()
        head = b"POST /v1/cycles HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with connected(stateful) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            connection.shutdown(how)
    until(lambda: len(stateful.client.get(f"/v1/engines/{name}").json().get("history", [])) == count)


def test_engine_id_with_control_characters_gets_422(stateful: Service, windows: Readings) -> None:
    """An engine id with control characters gets 422 with its location, since no URL path could contain it."""
    row = windows[0][0].tolist()
    for name in ("a\0b", "a\n", "\r", "\x7f", "\tid"):
        for path, body, place in (
            ("/v1/predict", {"instances": [{"engine_id": name, "telemetry": [row]}]}, ["instances", 0, "engine_id"]),
            ("/v1/cycles", {"cycles": [{"engine_id": name, "cycle": 1, "telemetry": row}]}, ["cycles", 0, "engine_id"]),
            ("/v1/labels", {"labels": [{"engine_id": name, "cycle": 1, "label": 0}]}, ["labels", 0, "engine_id"]),
            ("/v1/outcomes", {"engine_id": name, "failed_at_cycle": 9}, ["engine_id"]),
        ):
            answer = stateful.client.post(path, json=body)
            assert (422, place) == (answer.status_code, answer.json()["errors"][0]["loc"])


def test_late_flights_are_sorted_by_cycle(stateful: Service, windows: Readings) -> None:
    """Flights in any order, alone or together, form the window of their cycles in order."""
    rows = windows[1][:12]
    order = [3, 0, 7, 11, 1]
    for cycle in order:
        fly(stateful, "late", cycle, rows[cycle])
    rest = [
        {"engine_id": "late", "cycle": c, "telemetry": rows[c].tolist()} for c in range(11, -1, -1) if c not in order
    ]
    predicted = stateful.client.post("/v1/cycles", json={"cycles": rest}).json()["predictions"]
    for row in predicted:
        cycles = list(range(row["cycle"] + 1))
        expected = stateful.predict([{"telemetry": rows[cycles].tolist()}])["predictions"][0]
        assert expected["logits"] == row["logits"]


def test_repeated_flight_is_a_no_op(stateful: Service, windows: Readings) -> None:
    """A repeated flight returns its first prediction; another flight for its cycle is a conflict with both values."""
    first = fly(stateful, "twice", 4, windows[0][0])
    again = fly(stateful, "twice", 4, windows[0][0])
    assert ["joined", "unchanged"] == [one["results"][0]["result"] for one in (first, again)]
    assert first["predictions"] == again["predictions"]
    other = fly(stateful, "twice", 4, windows[0][1], status=409)
    both = other["results"][0]
    assert "conflict" == both["result"]
    assert pytest.approx(float(windows[0][0][5])) == both["known"]["sensor_4"]
    assert pytest.approx(float(windows[0][1][5])) == both["given"]["sensor_4"]
    mixed = stateful.client.post(
        "/v1/cycles",
        json={
            "cycles": [
                {"engine_id": "twice", "cycle": 4, "telemetry": windows[0][1].tolist()},
                {"engine_id": "twice", "cycle": 5, "telemetry": windows[0][1].tolist()},
            ]
        },
    ).json()
    assert ["conflict", "joined"] == [row["result"] for row in mixed["results"]]
    assert mixed["predictions"][0] is None
    assert 5 == mixed["predictions"][1]["cycle"]
    assert [4, 5] == [row["cycle"] for row in history(stateful, "twice")]


def test_repeated_flight_after_prediction_keeps_its_result(stateful: Service, windows: Readings) -> None:
    """A later prediction of the cycle counts, and the repeated flight returns its own first prediction."""
    fly(stateful, "own", 1, windows[0][0])
    first = fly(stateful, "own", 2, windows[0][1])
    instance = {"telemetry": windows[1].tolist(), "engine_id": "own", "cycle": 2}
    between = stateful.predict([instance])["predictions"][0]
    again = [fly(stateful, "own", 2, windows[0][1]) for _ in range(2)]
    assert ["unchanged"] * 2 == [one["results"][0]["result"] for one in again]
    assert [first["predictions"]] * 2 == [one["predictions"] for one in again]
    assert between["logits"] != first["predictions"][0]["logits"]
    every = stateful.client.get("/v1/engines/own?superseded=true").json()["history"]
    assert {first["predictions"][0]["prediction_id"]: False, between["prediction_id"]: True} == {
        row["prediction_id"]: row["is_latest"] for row in every if row["cycle"] == 2
    }


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_older_schema_is_migrated_with_equal_results(
    kind: str, windows: Readings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A database of schema 0001 is migrated, and its repeated flights return the prediction that counted."""
    url = f"sqlite:///{tmp_path}/memory.db" if kind == "sqlite" else request.getfixturevalue("cluster").url("older")
    instances = [{"telemetry": windows[1].tolist(), "engine_id": name, "cycle": 1} for name in ("a", "b")]
    with running(ENGINE_HEALTH_DATABASE_URL=url) as service:
        fly(service, "a", 1, windows[0][0])
        counted = service.predict(instances[:1])["predictions"]
        own = fly(service, "b", 1, windows[0][0])["predictions"]
    engine = create_engine(parse_url(url))
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE predictions DROP COLUMN flight")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    engine.dispose()
    with running(ENGINE_HEALTH_DATABASE_URL=url) as service:
        assert counted == fly(service, "a", 1, windows[0][0])["predictions"]
        service.predict(instances[1:])
        assert own == fly(service, "b", 1, windows[0][0])["predictions"]
        first = fly(service, "b", 2, windows[0][1])["predictions"]
        service.predict([instances[1] | {"cycle": 2}])
        assert first == fly(service, "b", 2, windows[0][1])["predictions"]


def test_flights_may_name_their_channels(stateful: Service, windows: Readings, manifest: Manifest) -> None:
    """A flight by channel names equals the flight in the manifest's order."""
    row = windows[3][0]
    named = dict(zip(manifest.channel_names, row.tolist(), strict=True))
    flight = {"engine_id": "named", "cycle": 1, "telemetry": named}
    by_name = stateful.client.post("/v1/cycles", json={"cycles": [flight]}).json()
    assert fly(stateful, "by-position", 1, row)["predictions"][0]["logits"] == by_name["predictions"][0]["logits"]


@pytest.mark.parametrize(
    ("flight", "loc"),
    [
        ({"engine_id": "x", "cycle": 1, "telemetry": [1.0] * 16}, ["cycles", 0, "telemetry"]),
        ({"engine_id": "x", "cycle": 1, "telemetry": [1.0] * 16 + [None]}, ["cycles", 0, "telemetry", "sensor_21"]),
        ({"engine_id": "x", "cycle": 1, "telemetry": [1.0] * 16 + [1e39]}, ["cycles", 0, "telemetry", "sensor_21"]),
        ({"engine_id": "x", "cycle": 1, "telemetry": [True] * 17}, ["cycles", 0, "telemetry", "op_setting_1"]),
        ({"engine_id": "x", "cycle": 1, "telemetry": {"sensor_99": 1}}, ["cycles", 0, "telemetry", "sensor_99"]),
        ({"engine_id": "x", "cycle": 1, "telemetry": None}, ["cycles", 0, "telemetry"]),
        ({"engine_id": "x", "cycle": -1, "telemetry": [1.0] * 17}, ["cycles", 0, "cycle"]),
        ({"engine_id": "", "cycle": 1, "telemetry": [1.0] * 17}, ["cycles", 0, "engine_id"]),
        ({"engine_id": "a\0b", "cycle": 1, "telemetry": [1.0] * 17}, ["cycles", 0, "engine_id"]),
        ({"engine_id": "x" * 201, "cycle": 1, "telemetry": [1.0] * 17}, ["cycles", 0, "engine_id"]),
        ({"cycle": 1, "telemetry": [1.0] * 17}, ["cycles", 0]),
    ],
)
def test_invalid_flight_is_located(stateful: Service, flight: dict[str, Any], loc: list[Any]) -> None:
    """An invalid value of a flight gets 422 with row and channel, and nothing of the request is stored."""
    good = {"engine_id": "not kept", "cycle": 1, "telemetry": [1.0] * 17}
    answer = stateful.client.post("/v1/cycles", json={"cycles": [flight, good]})
    assert 422 == answer.status_code, answer.text
    assert loc == answer.json()["errors"][0]["loc"]
    assert 404 == stateful.client.get("/v1/engines/not kept").status_code


@pytest.mark.parametrize("telemetry", [b'"\xff"', b'{"\xff": 1}', b'["\xff"]'])
def test_flight_with_invalid_utf8_gets_400(stateful: Service, telemetry: bytes) -> None:
    """Readings with invalid UTF-8 get 400."""
    body = b'{"cycles": [{"engine_id": "x", "cycle": 1, "telemetry": ' + telemetry + b"}]}"
    answer = stateful.client.post("/v1/cycles", content=body, headers={"Content-Type": "application/json"})
    assert 400 == answer.status_code, answer.text


def test_labels_have_each_a_result(stateful: Service, windows: Readings) -> None:
    """A label is joined, pending, unchanged, in conflict, revised or unknown; only a revision changes it."""
    prediction_id = fly(stateful, "labels", 1, windows[0][0])["predictions"][0]["prediction_id"]
    engine = {"engine_id": "labels"}
    assert ["joined", "pending", "unknown"] == submit_labels(
        stateful,
        {"prediction_id": prediction_id, "label": "normal"},
        engine | {"cycle": 2, "label": 1},
        {"prediction_id": "0" * 32, "label": 0},
    )
    assert ["unchanged", "conflict"] == submit_labels(
        stateful, engine | {"cycle": 1, "label": 0}, engine | {"cycle": 2, "label": [0, 0, 1]}
    )
    assert ["conflict"] == submit_labels(stateful, {"prediction_id": prediction_id, "label": "critical"}, status=409)
    assert ["normal"] == [row["label"] for row in history(stateful, "labels")]
    assert ["revised", "unchanged"] == submit_labels(
        stateful,
        {"prediction_id": prediction_id, "label": "critical", "revise": True},
        engine | {"cycle": 1, "label": 2},
    )
    fly(stateful, "labels", 2, windows[0][1])
    rows = history(stateful, "labels")
    assert ["critical", "degrading"] == [row["label"] for row in rows]
    assert ["inspection", "inspection"] == [row["source"] for row in rows]
    for row in rows:
        expected = numerics.cross_entropy(
            row["logits"], [["normal", "degrading", "critical"].index(row["label"])][0], row["temperature"]
        )
        assert pytest.approx(float(expected), rel=1e-6) == row["loss"]


@pytest.mark.parametrize(
    ("row", "loc"),
    [
        ({"label": 0}, ["labels", 0]),
        ({"label": 0, "engine_id": "x"}, ["labels", 0]),
        ({"label": 0, "engine_id": "x", "cycle": 1, "prediction_id": "y"}, ["labels", 0]),
        ({"label": 3, "engine_id": "x", "cycle": 1}, ["labels", 0, "label"]),
        ({"label": "worn", "engine_id": "x", "cycle": 1}, ["labels", 0, "label"]),
        ({"label": [0.5, 0.5], "engine_id": "x", "cycle": 1}, ["labels", 0, "label"]),
        ({"label": None, "engine_id": "x", "cycle": 1}, ["labels", 0, "label"]),
        ({"engine_id": "x", "cycle": 1}, ["labels", 0]),
    ],
)
def test_invalid_label_is_located(stateful: Service, row: dict[str, Any], loc: list[Any]) -> None:
    """An invalid label, or one without prediction or engine and cycle, gets 422 with its location."""
    answer = stateful.client.post("/v1/labels", json={"labels": [row]})
    assert 422 == answer.status_code, answer.text
    assert loc == answer.json()["errors"][0]["loc"]


def test_failure_labels_the_whole_history(stateful: Service, windows: Readings) -> None:
    """A failure labels earlier and later predictions by their RUL, and another failure of the engine conflicts."""
    for cycle in (10, 80, 140, 200):
        fly(stateful, "ends", cycle, windows[0][cycle % 50])
    post = stateful.client.post
    end = {"engine_id": "ends", "failed_at_cycle": 206}
    first, again = post("/v1/outcomes", json=end).json(), post("/v1/outcomes", json=end).json()
    assert ("joined", "unchanged") == (first["result"], again["result"])
    other = post("/v1/outcomes", json=end | {"failed_at_cycle": 190})
    assert 409 == other.status_code
    assert [{"result": "conflict", "given": 190, "known": 206}] == other.json()["results"]
    fly(stateful, "ends", 190, windows[0][0])
    labels = {row["cycle"]: (row["label"], row["source"]) for row in history(stateful, "ends")}
    assert {
        10: ("normal", "outcome"),
        80: ("normal", "outcome"),
        140: ("degrading", "outcome"),
        190: ("critical", "outcome"),
        200: ("critical", "outcome"),
    } == labels
    revised = post("/v1/outcomes", json=end | {"failed_at_cycle": 196, "revise": True}).json()
    assert "revised" == revised["result"]
    labels_now = {row["cycle"]: row["label"] for row in history(stateful, "ends")}
    assert ("degrading", None) == (labels_now[140], labels_now[200])  # a cycle after the failure has no label
    assert "pending" == post("/v1/outcomes", json={"engine_id": "never seen", "failed_at_cycle": 3}).json()["result"]


def test_continued_operation_labels_early_cycles(stateful: Service, windows: Readings) -> None:
    """A cycle more than 125 before the latest is normal, unless an inspection reported another class."""
    for cycle in (1, 2, 3):
        fly(stateful, "survivor", cycle, windows[0][cycle])
    submit_labels(stateful, {"engine_id": "survivor", "cycle": 2, "label": "degrading"})
    fly(stateful, "survivor", 128, windows[0][9])
    labels = [(row["label"], row["source"]) for row in history(stateful, "survivor")]
    assert [("normal", "survival"), ("degrading", "inspection"), (None, None), (None, None)] == labels
    fly(stateful, "survivor", 129, windows[0][9])
    assert ("normal", "survival") == tuple(history(stateful, "survivor")[2][key] for key in ("label", "source"))


def test_label_in_a_prediction_is_stored(stateful: Service, windows: Readings) -> None:
    """A label in a prediction request is counted once, and stored as an inspection."""
    before = stateful.metrics()["engine_health_labelled_total"]
    instance = {"telemetry": windows[0].tolist(), "engine_id": "immediate", "cycle": 7, "label": "critical"}
    stateful.predict([instance])
    assert ["unchanged"] == submit_labels(stateful, {"engine_id": "immediate", "cycle": 7, "label": 2})
    assert 1 == stateful.metrics()["engine_health_labelled_total"] - before
    stateful.predict([instance | {"label": None}])
    assert [("critical", "inspection")] == [(row["label"], row["source"]) for row in history(stateful, "immediate")]


def test_contradicting_label_is_reported(stateful: Service, windows: Readings, manifest: Manifest) -> None:
    """A conflicting label is scored in the response, reported with the stored one, and not stored."""
    submit_labels(stateful, {"engine_id": "odd", "cycle": 1, "label": "normal"})
    before = stateful.metrics()
    rows: list[dict[str, Any]] = [
        {"engine_id": "odd", "cycle": 1, "label": "critical"},
        {"engine_id": "even", "cycle": 1, "label": [0.25, 0.75, 0]},
        {"engine_id": "even", "cycle": 1, "label": 2},
        {"engine_id": "odd", "cycle": 1, "label": 0},
        {"engine_id": "odd", "cycle": 1},
        {"label": "degrading"},
    ]
    response = stateful.predict(
        [{"telemetry": w.tolist()} | row for w, row in zip(windows[[0, 1, 2, 3, 0, 1]], rows, strict=True)]
    )
    assert [
        {"result": "conflict", "given": "critical", "known": "normal"},
        {"result": "joined"},
        {"result": "conflict", "given": "critical", "known": {"normal": 0.25, "degrading": 0.75, "critical": 0.0}},
        {"result": "unchanged"},
        None,
        None,
    ] == response["results"]
    logits = np.array([row["logits"] for row in response["predictions"]])
    given_losses = numerics.cross_entropy(logits, [2, 1, 2, 0, 0, 1], manifest.temperature, reduction="none")
    assert pytest.approx(float(given_losses[0]), rel=1e-5) == response["predictions"][0]["loss"]
    stands = np.array([[1, 0, 0], [0.25, 0.75, 0], [0.25, 0.75, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    losses = numerics.cross_entropy(logits, stands, manifest.temperature, reduction="none")
    after = stateful.metrics()
    increases = {
        name: after[f"engine_health_{name}"] - before[f"engine_health_{name}"]
        for name in ("labelled_total", "loss_nats_total", "labellable_total")
    }
    assert {
        "labelled_total": 6,
        "loss_nats_total": pytest.approx(losses.sum(), rel=1e-5),
        "labellable_total": 6,
    } == increases
    assert ["normal"] == [row["label"] for row in history(stateful, "odd")]
    assert "results" not in stateful.predict([{"telemetry": windows[0].tolist()} | rows[1]])


def test_label_with_request_temperature_is_stored(stateful: Service, windows: Readings) -> None:
    """With a temperature of the request the label is stored for engine and cycle, and the prediction is not."""
    before = stateful.metrics()["engine_health_labelled_total"]
    instance = {"telemetry": windows[0].tolist(), "engine_id": "if", "cycle": 3, "label": "degrading"}
    response = stateful.predict([instance, instance | {"cycle": None}], temperature=2)
    assert ("request", 2) == (response["temperature_source"], response["evaluation"]["count"])
    assert [] == history(stateful, "if")
    assert (
        1 == stateful.metrics()["engine_health_labelled_total"] - before
    )  # the row without cycle, whose label cannot be stored
    stateful.predict([instance | {"label": None}])
    assert [("degrading", "inspection")] == [(row["label"], row["source"]) for row in history(stateful, "if")]
    assert ["unchanged"] == submit_labels(stateful, {"engine_id": "if", "cycle": 3, "label": 1})
    other = stateful.predict([instance | {"label": "normal"}], temperature=2)
    assert [{"result": "conflict", "given": "normal", "known": "degrading"}] == other["results"]
    assert 2 == stateful.metrics()["engine_health_labelled_total"] - before


def test_latest_prediction_of_a_cycle_counts(stateful: Service, windows: Readings) -> None:
    """The latest prediction of an engine and cycle counts, and superseded ones are returned on request."""
    instances = [{"telemetry": w.tolist(), "engine_id": "again", "cycle": 3} for w in windows[:3]]
    ids = [stateful.predict([instance])["predictions"][0]["prediction_id"] for instance in instances]
    ids += [row["prediction_id"] for row in stateful.predict(instances[:2])["predictions"]]
    assert ids[-1:] == [row["prediction_id"] for row in history(stateful, "again")]
    every = stateful.client.get("/v1/engines/again?superseded=true").json()["history"]
    assert sorted(ids) == sorted(row["prediction_id"] for row in every)
    assert [ids[-1]] == [row["prediction_id"] for row in every if row["is_latest"]]


def test_prediction_with_request_temperature_is_not_stored(stateful: Service, windows: Readings) -> None:
    """A prediction with a temperature of the request is answered and not stored."""
    instance = {"telemetry": windows[0].tolist(), "engine_id": "what if", "cycle": 3}
    response = stateful.predict([instance], temperature=5.0)
    assert "request" == response["temperature_source"]
    assert 404 == stateful.client.get("/v1/engines/what if").status_code


def test_engines_are_listed_worst_first(windows: Readings) -> None:
    """Engines are listed once by falling probability of the last class; `total` counts the filtered ones."""
    with running() as service:
        rows = [
            {"engine_id": f"e{k}", "cycle": k, "telemetry": (windows[k % 4][k % 50] * (1 + k / 1e4)).tolist()}
            for k in range(230)
        ]
        assert 200 == service.client.post("/v1/cycles", json={"cycles": rows}).status_code
        pages, url = [], "/v1/engines"
        while url:
            page = service.client.get(url).json()
            assert 230 == page["total"]
            pages.append(page["engines"])
            url = f"/v1/engines?next={page['next']}" if page["next"] else ""
        assert [100, 100, 30] == list(map(len, pages))
        every = [row for page in pages for row in page]
        assert {row["engine_id"] for row in every} == {f"e{k}" for k in range(230)}
        risks = [row["probabilities"]["critical"] for row in every]
        assert sorted(risks, reverse=True) == risks
        for health in ("normal", "degrading", "critical"):
            page = service.client.get("/v1/engines", params={"health": health}).json()
            assert sum(row["health"] == health for row in every) == page["total"]
            assert {health} >= {row["health"] for row in page["engines"]}
        for query in ("health=worn", "next=nonsense", "next=%00", "page=2", "health=normal&health=critical"):
            assert 422 == service.client.get(f"/v1/engines?{query}").status_code


@pytest.mark.parametrize("name", ["a", "\U0001f680" * MAX_NAME_LENGTH, "\x01" * MAX_NAME_LENGTH, '"' * MAX_NAME_LENGTH])
def test_cursor_works_for_any_engine_name(name: str) -> None:
    """The cursor of a page works for any name of its last engine."""
    assert (1 / 3, name) == decode_cursor(encode_cursor(1 / 3, name))


def test_call_without_store_gets_501(windows: Readings) -> None:
    """Without a store predictions are answered, and calls that need one get 501 with the setting's name."""
    with running(ENGINE_HEALTH_DATABASE_URL="") as service:
        assert service.predict([{"telemetry": windows[0].tolist(), "engine_id": "a", "cycle": 1}])
        assert math.isnan(service.metrics()["engine_health_store_up"])  # neither 0 nor 1, so that no alert fires
        flight = {"engine_id": "a", "cycle": 1, "telemetry": windows[0][0].tolist()}
        responses = [
            service.client.post("/v1/cycles", json={"cycles": [flight]}),
            service.client.post("/v1/labels", json={"labels": [{"engine_id": "a", "cycle": 1, "label": 0}]}),
            service.client.post("/v1/outcomes", json={"engine_id": "a", "failed_at_cycle": 1}),
            service.client.get("/v1/engines"),
            service.client.get("/v1/engines/a"),
        ]
        for response in responses:
            assert 501 == response.status_code
            assert "ENGINE_HEALTH_DATABASE_URL" in response.json()["detail"]


def test_model_without_windows_collects_no_flights(tmp_path: Path) -> None:
    """Flights for a model without windows get 422 with the reason."""
    with running(ENGINE_HEALTH_MODEL=str(identity_classifier(tmp_path / "m.onnx", FOUR))) as service:
        answer = service.client.post(
            "/v1/cycles", json={"cycles": [{"engine_id": "a", "cycle": 1, "telemetry": [1, 2, 3]}]}
        )
        assert 422 == answer.status_code
        assert "window" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_workers_read_each_others_flights(
    kind: str, windows: Readings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With two workers, flights over changing connections form one window."""
    url = f"sqlite:///{tmp_path}/memory.db" if kind == "sqlite" else request.getfixturevalue("cluster").url("workers")
    flights = windows[0]
    with running(ENGINE_HEALTH_WORKERS="2", ENGINE_HEALTH_DATABASE_URL=url) as service:
        until_all_are_ready(service, 2)
        for cycle, row in enumerate(flights[:40]):
            with httpx.Client(base_url=service.client.base_url, timeout=60, trust_env=False) as client:
                flight = {"engine_id": "shared", "cycle": cycle, "telemetry": row.tolist()}
                flown = client.post("/v1/cycles", json={"cycles": [flight]}).json()["predictions"][0]
            expected = service.predict([{"telemetry": flights[: cycle + 1].tolist()}])["predictions"][0]
            assert expected["logits"] == flown["logits"], cycle


def test_flights_of_two_services_form_one_window(windows: Readings, tmp_path: Path) -> None:
    """Services that share a database rebuild stale windows, and count each flight's wait once."""
    shared, flights = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{tmp_path}/memory.db"}, windows[0]
    with running(**shared) as one, running(**shared) as other:
        for cycle, row in enumerate(flights[:12]):
            flown = fly((one, other)[cycle // 2 % 2], "shared", cycle, row)["predictions"][0]
            expected = one.predict([{"telemetry": flights[: cycle + 1].tolist()}])["predictions"][0]
            assert expected["logits"] == flown["logits"], cycle
        assert list(range(12)) == [row["cycle"] for row in history(one, "shared")]
        assert (
            6 <= other.metrics()["engine_health_queue_duration_seconds_count"] <= 7
        )  # one tail was stale, and its flight waited twice
        assert 6 == other.metrics()["engine_health_labellable_total"]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_acknowledged_rows_survive_kill(database: str) -> None:
    """After `kill -9` during ingestion every acknowledged flight and label is stored exactly once."""
    report = survive_in(database, kills=3, seed=1)  # `make kills` runs 100
    assert report.passed(), report


def test_predictions_continue_without_the_database(windows: Readings, tmp_path: Path) -> None:
    """While the database is locked, predictions are answered without being stored, and other calls get 503."""
    path = tmp_path / "memory.db"
    instance = {"telemetry": windows[0].tolist(), "engine_id": "a", "cycle": 1}
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{path}") as service:
        assert service.predict([instance])["predictions"][0]["prediction_id"]
        with sqlite3.connect(path, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            predictions = service.predict([instance | {"cycle": 2}, {"telemetry": windows[1].tolist()}])["predictions"]
            assert predictions[0]["prediction_id"] is None
            assert predictions[1]["prediction_id"]
            answer = service.client.post("/v1/outcomes", json={"engine_id": "a", "failed_at_cycle": 9})
            assert 503 == answer.status_code
            assert "locked" in answer.json()["detail"]
            assert int(answer.headers["retry-after"]) >= 1
            until(lambda: service.metrics()["engine_health_store_up"] == 0)
            assert 1 == service.metrics()["engine_health_predictions_not_stored_total"]
            other.execute("ROLLBACK")
        until(lambda: service.metrics()["engine_health_store_up"] == 1)
        assert service.predict([instance | {"cycle": 3}])["predictions"][0]["prediction_id"]
        assert [1, 3] == [row["cycle"] for row in history(service, "a")]


def test_full_disk_gets_503_and_loses_nothing(windows: Readings, tmp_path: Path) -> None:
    """Without disk space flights get 503 and predictions are not stored; with space again the service continues."""
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{tmp_path}/memory.db") as service:
        fly(service, "full", 1, windows[0][0])
        size = (tmp_path / "memory.db-wal").stat().st_size
        limit = ["prlimit", "--pid", str(service.process.pid)]
        subprocess.run([*limit, f"--fsize={size}:unlimited"], check=True)
        flight = {"engine_id": "full", "cycle": 2, "telemetry": windows[0][1].tolist()}
        until(lambda: service.client.post("/v1/cycles", json={"cycles": [flight]}).status_code == 503)
        response = service.predict([{"telemetry": windows[0].tolist(), "engine_id": "full", "cycle": 3}])
        assert response["predictions"][0]["prediction_id"] is None
        subprocess.run([*limit, "--fsize=unlimited:unlimited"], check=True)
        until(lambda: service.client.post("/v1/cycles", json={"cycles": [flight]}).status_code == 200)
        cycles = [row["cycle"] for row in history(service, "full")]
        assert [1, 2] == cycles


def test_postgresql_restart_loses_no_acknowledged_flight(windows: Readings, cluster: Postgres) -> None:
    """While PostgreSQL is down flights get 503 and predictions continue; acknowledged flights remain."""
    with running(ENGINE_HEALTH_DATABASE_URL=cluster.url("gone")) as service:
        fly(service, "a", 1, windows[0][0])
        cluster.stop()
        flight = {"engine_id": "a", "cycle": 2, "telemetry": windows[0][1].tolist()}
        assert 503 == service.client.post("/v1/cycles", json={"cycles": [flight]}).status_code
        response = service.predict([{"telemetry": windows[0].tolist(), "engine_id": "a", "cycle": 5}])
        assert response["predictions"][0]["prediction_id"] is None
        assert 503 == service.client.get("/v1/engines").status_code
        cluster.start()
        until(lambda: service.client.post("/v1/cycles", json={"cycles": [flight]}).status_code == 200)
        assert [1, 2] == [row["cycle"] for row in history(service, "a")]


def test_flight_without_finite_prediction_is_located(tmp_path: Path) -> None:
    """Readings on which the network overflows get 422 with their row, and nothing of the request is stored."""
    path = window_classifier(tmp_path / "over.onnx", "ReduceMax", 2)
    with running(ENGINE_HEALTH_MODEL=str(path)) as service:
        rows = [("b", 7, [1, 2]), ("a", 3, [1, 2]), ("b", 2, [3e38, 1]), ("a", 1, [2, 1])]
        cycles = [{"engine_id": e, "cycle": c, "telemetry": row} for e, c, row in rows]
        answer = service.client.post("/v1/cycles", json={"cycles": cycles})
        assert 422 == answer.status_code, answer.text
        assert answer.json()["detail"].startswith("cycles[")
        assert answer.json()["errors"][0]["loc"] in (["cycles", 2, "telemetry"], ["cycles", 0, "telemetry"])
        assert 404 == service.client.get("/v1/engines/b").status_code


def test_engines_are_filtered_by_change(stateful: Service, windows: Readings) -> None:
    """`since` selects engines with a newer prediction or failure, `running` those without a failure."""
    for name in ("changed-a", "changed-b", "changed-c"):
        fly(stateful, name, 1, windows[0][0])
    first = {row["engine_id"]: row for row in engines(stateful, limit=1000)}
    since = max(row["updated_at"] for row in first.values())
    fly(stateful, "changed-b", 2, windows[0][1])
    end = {"engine_id": "changed-c", "failed_at_cycle": 9}
    assert 200 == stateful.client.post("/v1/outcomes", json=end).status_code
    changed = {row["engine_id"]: row["failed_at_cycle"] for row in engines(stateful, since=since)}
    assert {"changed-b": None, "changed-c": 9}.items() <= changed.items()
    assert set(changed) <= {"changed-b", "changed-c", *(k for k, row in first.items() if row["updated_at"] == since)}
    assert set(first) - {"changed-c"} >= {row["engine_id"] for row in engines(stateful, running=True, limit=1000)}
    assert 9 == stateful.client.get("/v1/engines/changed-c").json()["failed_at_cycle"]
    for value in ("yesterday", "2026-11-25T12:00:00", ""):
        assert 422 == stateful.client.get("/v1/engines", params={"since": value}).status_code
    assert 422 == stateful.client.get("/v1/engines", params={"limit": 1001}).status_code


def test_pages_of_any_size_list_every_engine_once(stateful: Service, windows: Readings) -> None:
    """Pages of 7 engines together equal one page of 1000, and `total` is the same on each."""
    for k in range(9):
        fly(stateful, f"paged-{k}", 1, windows[k % 4][k])
    whole = engines(stateful, limit=1000)
    listed: list[dict[str, Any]] = []
    following = None
    while following is not None or not listed:
        query = {"limit": 7} | ({"next": following} if following else {})
        page = stateful.client.get("/v1/engines", params=query).json()
        assert len(whole) == page["total"]
        listed, following = listed + page["engines"], page["next"]
    assert whole == listed


def test_trend_has_the_predictions_of_the_last_cycles(stateful: Service, windows: Readings) -> None:
    """A trend has the probability of the last class for the latest cycles, as in the history."""
    for cycle, row in enumerate(windows[3][:12]):
        fly(stateful, "trend", cycle, row)
    stateful.predict(
        [{"engine_id": "trend", "cycle": 10, "telemetry": windows[3][:3].tolist()}]
    )  # replaces the prediction of the flight
    trend = next(row for row in engines(stateful, trend=5, limit=1000) if row["engine_id"] == "trend")["trend"]
    past = {row["cycle"]: row["probabilities"]["critical"] for row in history(stateful, "trend")}
    assert [[cycle, past[cycle]] for cycle in range(7, 12)] == trend
    assert "trend" not in engines(stateful)[0]


def test_sensors_need_stored_flights(stateful: Service, windows: Readings, manifest: Manifest) -> None:
    """`sensors` has each sensor of the stored flights, and nothing for predictions without flights."""
    for cycle, row in enumerate(windows[0][-15:]):
        fly(stateful, "sensed", cycle, row)
    stateful.predict([{"engine_id": "unflown", "cycle": 1, "telemetry": windows[0][:2].tolist()}])
    sensors = stateful.client.get("/v1/engines/sensed", params={"sensors": True}).json()["sensors"]
    assert list(range(15)) == sensors["cycles"]
    assert {name for name in manifest.channel_names if name.startswith("sensor")} == {
        sensor["channel"] for sensor in sensors["channels"]
    }
    distances = [abs(sensor["shift"]) for sensor in sensors["channels"]]
    assert sorted(distances, reverse=True) == distances
    assert distances[0] == pytest.approx(abs(np.mean(sensors["channels"][0]["deviations"][-10:])), abs=1e-4)
    unflown = stateful.client.get("/v1/engines/unflown", params={"sensors": True}).json()["sensors"]
    assert {"cycles": [], "channels": []} == unflown
