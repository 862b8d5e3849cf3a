import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model.windows import Readings
from tests.conftest import Service, running
from tests.test_memory import fly, history
from tests.test_serving import until


def asked(windows: Readings, cycle: int) -> list[dict[str, Any]]:
    return [{"telemetry": windows[0].tolist(), "engine_id": "a", "cycle": cycle}]


def kept_id(service: Service, windows: Readings, cycle: int) -> str | None:
    found: str | None = service.predict(asked(windows, cycle))["predictions"][0]["prediction_id"]
    return found


def move(path: Path, to: Path) -> None:
    """An SQLite database with what lies beside it."""
    for end in ("", "-wal", "-shm"):
        beside = path.with_name(path.name + end)
        if beside.exists():
            beside.rename(to.with_name(to.name + end))


def test_nobody_s_prediction_is_refused_for_a_locked_database(windows: Readings, tmp_path: Path) -> None:
    """Predictions that wait behind one that waits for a lock are answered and not kept, however long that takes."""
    path = tmp_path / "memory.db"
    kept = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{path}", "ENGINE_HEALTH_MAX_QUEUE_SECONDS": "0.5"}
    with running(**kept) as service, sqlite3.connect(path, isolation_level=None) as other:
        assert kept_id(service, windows, 0)
        other.execute("BEGIN IMMEDIATE")

        def ask(k: int) -> str | None:
            time.sleep(k / 2)  # while the first one waits
            return kept_id(service, windows, k + 1)

        with ThreadPoolExecutor(6) as pool:
            assert [None] * 6 == list(pool.map(ask, range(6)))
        assert 6 == service.metrics()["engine_health_unremembered_total"]
        other.execute("ROLLBACK")
        until(lambda: kept_id(service, windows, 9))


def test_looking_something_up_makes_no_database(windows: Readings, tmp_path: Path) -> None:
    """A file that is moved away stays away: who looks something up hears so, and it is found again with all it has."""
    path, away = tmp_path / "memory.db", tmp_path / "away.db"
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{path}") as service:
        fly(service, "a", 1, windows[0][0])
        move(path, away)
        until(lambda: service.client.get("/v1/engines").status_code == 503)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(service.client.get, ["/v1/calibration"] * 16))
        assert {503} == {answer.status_code for answer in answers}
        assert "gone" in answers[0].json()["detail"]
        assert kept_id(service, windows, 2) is None
        assert not path.exists()
        move(away, path)
        until(lambda: kept_id(service, windows, 3))
        assert [1, 3] == [row["cycle"] for row in history(service, "a")]


def test_another_database_may_take_the_place_of_the_first(windows: Readings, tmp_path: Path) -> None:
    """A backup that is put back while the service runs is gone on with: nothing of the file before is mixed into it."""
    path, other = tmp_path / "memory.db", tmp_path / "other.db"
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{other}"):
        pass
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{path}") as service:
        fly(service, "b", 1, windows[0][0])
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink()
        other.rename(path)
        fly(service, "a", 2, windows[0][1])
        assert kept_id(service, windows, 3)
        assert 404 == service.client.get("/v1/engines/b").status_code
        assert [2, 3] == [row["cycle"] for row in history(service, "a")]
        assert "joined" == fly(service, "b", 1, windows[0][0])["results"][0]["result"]


@pytest.mark.parametrize("path", ["/v1/engines", "/v1/calibration"])
def test_a_newer_database_met_later_is_left_alone(path: str, windows: Readings, tmp_path: Path) -> None:
    """Newer code's database in place of ours: predictions go on and are not kept, the rest is 503 with the reason."""
    place, newer = tmp_path / "memory.db", tmp_path / "newer.db"
    with sqlite3.connect(newer) as made:
        made.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        made.execute("INSERT INTO alembic_version VALUES ('9999')")
    with running(ENGINE_HEALTH_DATABASE_URL=f"sqlite:///{place}") as service:
        assert kept_id(service, windows, 1)
        move(place, tmp_path / "away.db")
        newer.rename(place)
        assert kept_id(service, windows, 2) is None
        flight = {"engine_id": "a", "cycle": 3, "telemetry": windows[0][0].tolist()}
        told, looked = service.client.post("/v1/cycles", json={"cycles": [flight]}), service.client.get(path)
        assert (503, 503) == (told.status_code, looked.status_code)
        assert "schema 9999" in told.json()["detail"]
        assert "schema 9999" in looked.json()["detail"]
