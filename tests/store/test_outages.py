import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from model.windows import Readings
from tests.support.postgres import Postgres, postgres
from tests.support.processes import ADMIN, Service, running, until
from tests.support.stored import fly, history, submit_labels


def instances_of(windows: Readings, cycle: int) -> list[dict[str, Any]]:
    return [{"telemetry": windows[0].tolist(), "engine_id": "a", "cycle": cycle}]


def stored_id(service: Service, windows: Readings, cycle: int) -> str | None:
    prediction_id: str | None = service.predict(instances_of(windows, cycle))["predictions"][0]["prediction_id"]
    return prediction_id


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    with postgres() as started:
        yield started


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A small separate file system, which only root can mount."""
    folder = Path(tempfile.mkdtemp(prefix="engine-health-disk-"))
    folder.chmod(0o755)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=777", "tmpfs", folder]).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def filled(disk: Path) -> Path:
    """Fill the free space with a file, and return its path."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def flights(engine_id: str, windows: Readings, cycles: range) -> dict[str, Any]:
    return {"cycles": [{"engine_id": engine_id, "cycle": c, "telemetry": windows[0][c % 50].tolist()} for c in cycles]}


def counters(service: Service) -> dict[str, float]:
    """Return the counters that one prediction increments."""
    samples = service.metrics()
    names = ("batch_rows_sum", "inference_duration_seconds_count", "confidence_count", "labellable_total")
    every = sum(value for name, value in samples.items() if name.startswith("engine_health_predictions_total"))
    return {name: samples[f"engine_health_{name}"] for name in names} | {"predictions_total": every}


def move(path: Path, to: Path) -> None:
    """Move the files of an SQLite database."""
    for end in ("", "-wal", "-shm"):
        file = path.with_name(path.name + end)
        if file.exists():
            file.rename(to.with_name(to.name + end))


def test_predictions_continue_behind_a_locked_database(windows: Readings, tmp_path: Path) -> None:
    """Predictions during a lock of the database are answered and not stored, however long the lock lasts."""
    path = tmp_path / "memory.db"
    environment = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{path}", "ENGINE_HEALTH_MAX_QUEUE_SECONDS": "0.5"}
    with running(**environment) as service, sqlite3.connect(path, isolation_level=None) as other:
        assert stored_id(service, windows, 0)
        other.execute("BEGIN IMMEDIATE")

        def ask(k: int) -> str | None:
            time.sleep(k / 2)  # the first request waits
            return stored_id(service, windows, k + 1)

        with ThreadPoolExecutor(6) as pool:
            assert [None] * 6 == list(pool.map(ask, range(6)))
        assert 6 == service.metrics()["engine_health_predictions_not_stored_total"]
        other.execute("ROLLBACK")
        until(lambda: stored_id(service, windows, 9))


def test_read_creates_no_database_file(windows: Readings, tmp_path: Path) -> None:
    """Reads of a missing file get 503 and create no file; a restored file is used with all its rows."""
    path, away = tmp_path / "memory.db", tmp_path / "away.db"
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{path}") as service:
        fly(service, "a", 1, windows[0][0])
        move(path, away)
        until(lambda: service.client.get("/v1/engines").status_code == 503)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(service.client.get, ["/v1/calibration"] * 16))
        assert {503} == {answer.status_code for answer in answers}
        assert "does not exist any more" in answers[0].json()["detail"]
        assert stored_id(service, windows, 2) is None
        assert not path.exists()
        move(away, path)
        until(lambda: stored_id(service, windows, 3))
        assert [1, 3] == [row["cycle"] for row in history(service, "a")]


def test_restored_backup_replaces_the_database(windows: Readings, tmp_path: Path) -> None:
    """A backup that replaces the file while the service runs is used, without rows of the file before."""
    path, other = tmp_path / "memory.db", tmp_path / "other.db"
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{other}"):
        pass
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{path}") as service:
        fly(service, "b", 1, windows[0][0])
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink()
        other.rename(path)
        fly(service, "a", 2, windows[0][1])
        assert stored_id(service, windows, 3)
        assert 404 == service.client.get("/v1/engines/b").status_code
        assert [2, 3] == [row["cycle"] for row in history(service, "a")]
        assert "joined" == fly(service, "b", 1, windows[0][0])["results"][0]["result"]


@pytest.mark.parametrize("path", ["/v1/engines", "/v1/calibration"])
def test_newer_database_at_runtime_is_not_changed(path: str, windows: Readings, tmp_path: Path) -> None:
    """A file of a newer schema gives 503 with the reason; predictions continue and are not stored."""
    place, newer = tmp_path / "memory.db", tmp_path / "newer.db"
    with sqlite3.connect(newer) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES ('9999')")
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{place}") as service:
        assert stored_id(service, windows, 1)
        move(place, tmp_path / "away.db")
        newer.rename(place)
        assert stored_id(service, windows, 2) is None
        flight = {"engine_id": "a", "cycle": 3, "telemetry": windows[0][0].tolist()}
        written, read = service.client.post("/v1/cycles", json={"cycles": [flight]}), service.client.get(path)
        assert (503, 503) == (written.status_code, read.status_code)
        assert "schema 9999" in written.json()["detail"]
        assert "schema 9999" in read.json()["detail"]


def test_unresponsive_database_does_not_block_predictions(windows: Readings, cluster: Postgres) -> None:
    """A database that stops responding delays no prediction for long, and is used again afterwards."""
    with running(ENGINE_HEALTH_DATABASE_URL=cluster.url("silent")) as service:
        fly(service, "a", 1, windows[0][0])
        cluster.pause()
        try:
            assert stored_id(service, windows, 2) is None
            assert stored_id(service, windows, 3) is None
            flight = flights("a", windows, range(4, 5))
            written, read = service.client.post("/v1/cycles", json=flight), service.client.get("/v1/engines")
            assert {(503, "the database does not respond")} == {
                (response.status_code, response.json()["detail"]) for response in (written, read)
            }
            until(lambda: service.metrics()["engine_health_store_up"] == 0)
        finally:
            cluster.pause(False)
        until(lambda: service.client.post("/v1/cycles", json=flight).status_code == 200)
        cycles = [row["cycle"] for row in history(service, "a")]
        assert [
            1,
            2,
            4,
        ] == cycles  # the second was in progress, and is stored although its response did not acknowledge it
        assert {3} == set(counters(service).values()) - {4}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_full_file_system_loses_no_acknowledged_row(
    kind: str, windows: Readings, small_disk: Path, request: pytest.FixtureRequest
) -> None:
    """On a full file system flights get 503 and predictions are not stored; acknowledged rows remain."""
    url = f"sqlite:///{small_disk}/memory.db"
    if kind == "postgresql":
        url = request.getfixturevalue("cluster").url("crowded", small_disk)
    with running(ENGINE_HEALTH_DATABASE_URL=url) as service:
        fly(service, "first", 1, windows[0][0])
        submit_labels(service, {"engine_id": "first", "cycle": 1, "label": "normal"})
        ballast, acknowledged = filled(small_disk), 0
        while service.client.post(
            "/v1/cycles", json=flights("full", windows, range(acknowledged, acknowledged + 20))
        ).is_success:
            acknowledged += 20
        body = flights("full", windows, range(acknowledged, acknowledged + 20))
        refused = service.client.post("/v1/cycles", json=body)
        assert 503 == refused.status_code
        assert stored_id(service, windows, 1) is None
        until(lambda: service.metrics()["engine_health_store_up"] == 0)
        assert 1 <= service.metrics()["engine_health_predictions_not_stored_total"]
        ballast.unlink()
        until(lambda: service.client.post("/v1/cycles", json=body).is_success)
        assert list(range(acknowledged + 20)) == [row["cycle"] for row in history(service, "full")]
        assert ["normal"] == [row["label"] for row in history(service, "first")]


def test_retried_transaction_counts_once(windows: Readings, cluster: Postgres) -> None:
    """A transaction that PostgreSQL aborts, by deadlock or serialisation failure, is retried and counted once."""
    url = cluster.url("again")
    with running(ENGINE_HEALTH_DATABASE_URL=url) as service, psycopg.connect(url, autocommit=True) as other:
        submit_labels(service, {"engine_id": "a", "cycle": 7, "label": "normal"})
        other.execute("CREATE SEQUENCE tries")  # a rollback does not reset a sequence
        other.execute(
            "CREATE FUNCTION give_up() RETURNS trigger AS $$ DECLARE n int = nextval('tries'); BEGIN "
            "IF n = 1 THEN RAISE deadlock_detected; ELSIF n = 2 THEN RAISE serialization_failure; END IF; "
            "RETURN NULL; END $$ LANGUAGE plpgsql"
        )
        other.execute("CREATE TRIGGER gives_up AFTER INSERT ON predictions EXECUTE FUNCTION give_up()")
        fly(service, "a", 7, windows[0][0])
        assert (3,) == other.execute("SELECT last_value FROM tries").fetchone()
        assert {1} == set(counters(service).values())
        assert 1 == service.metrics()["engine_health_labelled_total"]


def test_flights_retried_after_a_failure_count_once(windows: Readings, tmp_path: Path) -> None:
    """A flight whose shared transaction is retried for another request's failure is counted once."""
    path = tmp_path / "memory.db"
    environment = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{path}", "ENGINE_HEALTH_ADMIN_KEYS": "wheel"}
    with (
        running(**environment) as service,
        sqlite3.connect(path, isolation_level=None) as other,
        ThreadPoolExecutor(3) as pool,
    ):
        other.execute("BEGIN IMMEDIATE")
        put = "/v1/calibration/temperature"
        tasks = []
        for cycle in (1, 2):  # the first waits for the lock, the others form one transaction
            tasks.append(pool.submit(fly, service, f"engine-{cycle}", cycle, windows[0][cycle]))
            time.sleep(0.3)
        wrong = pool.submit(service.client.put, put, json={"fit_id": "none"}, headers=ADMIN)
        time.sleep(0.3)
        other.execute("ROLLBACK")
        assert 404 == wrong.result().status_code
        assert [1, 2] == [task.result()["predictions"][0]["cycle"] for task in tasks]
        assert {2} == set(counters(service).values())
