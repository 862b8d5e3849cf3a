import asyncio
import json
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, text

from model.contract import Manifest
from model.numerics import Floats, log_softmax
from service.errors import SchemaRejected, SettingsRejected, StoreUnavailable
from service.store.records import CountedPredictions, EnginePage, EngineQuery, LabelSubmission
from service.store.sql import labels, predictions, queries, retention
from service.store.sql.database import Database
from service.store.sql.labels import LabelWrite, OutcomeSubmission
from service.store.sql.migrate import migrate
from service.store.sql.predictions import ModelVersion, NewPrediction, PredictionWrite
from service.store.sql.session import WriteSession
from service.store.sql.tables import metadata
from service.store.sql.urls import parse_url
from tests.support.postgres import Postgres, postgres
from tests.support.stored import CLASSES, MANIFEST

DIGEST = "d" * 64
Step = tuple[Any, ...]  # one step: ("predict", engine, cycle), ("label", ...), ("end", ...), ("kill",)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    with postgres() as started:
        yield started


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "empty.db"
    asyncio.run(apply_steps(f"sqlite:///{path}", []))
    return path


def opened(url: str) -> tuple[Database, WriteSession]:
    session = WriteSession()
    return Database(url, session.clear, 1000, 60), session


def logits_of(engine: str, cycle: int) -> bytes:
    random = np.random.default_rng([*engine.encode(), cycle])
    return random.normal(0, 2, CLASSES).astype(np.float32).tobytes()


def one_hot(k: int) -> Floats:
    return np.asarray(np.eye(CLASSES)[k])


async def apply_steps(url: str, steps: list[Step]) -> CountedPredictions:
    """Apply steps to a database; after "kill" continue with the connections of a new process."""
    database, session = opened(url)
    databases = [database]
    await database.connect()
    for k, step in enumerate(steps):
        kind, *rest = step
        if kind == "kill":
            database, session = opened(url)
            databases.append(database)
            await database.connect()
        elif kind == "predict":
            engine, cycle = rest
            prediction = NewPrediction(f"{k:032x}", engine, cycle, logits_of(engine, cycle), 1.0, 0, 0.5, None)
            batch = PredictionWrite(ModelVersion(DIGEST, MANIFEST, 1.0, "artefact"), float(k), [prediction])
            await database.write(partial(predictions.record_predictions, session), batch)
        elif kind == "label":
            engine, cycle, truth, revise = rest
            submission = LabelSubmission(None, engine, cycle, one_hot(truth), revise)
            await database.write(partial(labels.record_labels, session), LabelWrite([submission], float(k)))
        else:
            engine, failed_at, revise = rest
            await database.write(
                partial(labels.record_outcomes, session), OutcomeSubmission(engine, failed_at, revise, float(k))
            )
    counted = await database.read(lambda connection: queries.counted(connection, DIGEST, CLASSES, None))
    for opened_database in databases:
        await opened_database.close()
    return counted


async def pruned(database: Database, before: float) -> int:
    """Delete the rows before a time, and return their number."""
    await database.connect()
    old = await database.read(lambda connection: retention.find_expired(connection, before))
    return await database.write(retention.delete_expired, old)


def joined_offline(steps: list[Step]) -> dict[bytes, bytes | None]:
    """Return the label of every prediction by its logits, from all reports, independent of their order."""
    predicted = {(step[1], step[2]) for step in steps if step[0] == "predict"}
    inspected = {(step[1], step[2]): step[3] for step in steps if step[0] == "label"}  # the last label counts
    ends = {step[1]: step[2] for step in steps if step[0] == "end"}
    joined: dict[bytes, bytes | None] = {}
    for engine, cycle in predicted:
        newest = max(c for e, c in predicted if e == engine)
        truth: int | None = None
        if (engine, cycle) in inspected:
            truth = inspected[engine, cycle]
        elif engine in ends:
            rul = ends[engine] - cycle
            truth = None if rul < 0 else 0 if rul > 125 else 1 if rul > 50 else 2
        elif newest - cycle > 125:
            truth = 0
        joined[logits_of(engine, cycle)] = None if truth is None else one_hot(truth).tobytes()
    return joined


ENGINES = st.sampled_from(["a", "b", "ä c"])
CYCLES = st.sampled_from([0, 1, 2, 10, 49, 50, 51, 124, 125, 126, 127, 200, 251, 300])
EVENTS = st.one_of(
    st.tuples(st.just("predict"), ENGINES, CYCLES),
    st.tuples(st.just("predict"), ENGINES, CYCLES),
    st.tuples(st.just("label"), ENGINES, CYCLES, st.integers(0, CLASSES - 1)),
    st.tuples(st.just("end"), ENGINES, CYCLES),
    st.just(("kill",)),
)


def with_revisions(events: list[Step]) -> list[Step]:
    """Return a copy of the reports in which contradictions have `revise` and repetitions do not."""
    stands: dict[tuple[Any, ...], int] = {}
    steps = []
    for event in events:
        if event[0] in ("label", "end"):
            key, value = event[:-1], event[-1]
            steps.append((*event, stands.get(key, value) != value))
            stands[key] = value
        else:
            steps.append(event)
    return steps


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(EVENTS, min_size=3, max_size=25), st.data())
def test_labels_join_in_any_order(
    template: Path, tmp_path_factory: pytest.TempPathFactory, events: list[Step], data: Any
) -> None:
    """Any order, repetition, revision and restart between two steps gives the labels of an offline join."""
    path = tmp_path_factory.mktemp("order") / "memory.db"
    shutil.copy(template, path)
    shuffled = with_revisions(data.draw(st.permutations(events + events[:5])))
    counted = asyncio.run(apply_steps(f"sqlite:///{path}", shuffled))
    labels_found = {
        logits.astype(np.float32).tobytes(): None if np.isnan(label).any() else label.tobytes()
        for logits, label in zip(counted.logits, counted.label, strict=True)
    }
    assert joined_offline(shuffled) == labels_found
    assert len(labels_found) == len(counted.logits)  # each engine and cycle counts once


def test_order_of_reports_changes_no_figure(template: Path, tmp_path: Path) -> None:
    """Rows are sorted by engine and cycle, so that sums and resampled engines have equal bits."""
    steps: list[Step] = [("predict", e, c) for e in ("b", "ä c", "a") for c in (7, 1, 130)]
    steps += [("label", "b", 7, 1, False), ("end", "a", 140, False)]
    counted = []
    for k, order in enumerate((steps, steps[::-1])):
        shutil.copy(template, tmp_path / f"{k}.db")
        counted.append(asyncio.run(apply_steps(f"sqlite:///{tmp_path}/{k}.db", order)))
    assert [0, 0, 0, 1, 1, 1, 2, 2, 2] == counted[0].engine.tolist()
    for name in ("logits", "temperature", "label", "engine", "source"):
        np.testing.assert_array_equal(getattr(counted[0], name), getattr(counted[1], name))


def test_migrated_schema_equals_the_tables_of_the_code(cluster: Postgres, template: Path) -> None:
    """The migrations create exactly the tables of the code, and a second run changes nothing."""
    url = cluster.url("schema").replace("postgresql:", "postgresql+psycopg:")
    for address_ in (f"sqlite:///{template}", url):
        engine = create_engine(address_)
        migrate(engine)
        migrate(engine)
        with engine.connect() as connection:
            assert [] == compare_metadata(MigrationContext.configure(connection), metadata)
        engine.dispose()


def test_postgresql_joins_as_sqlite_does(cluster: Postgres, tmp_path: Path) -> None:
    """The same reports give equal rows in both databases, including revisions and continued operation."""
    steps: list[Step] = with_revisions(
        [
            ("predict", "a", 0),
            ("label", "a", 0, 2),
            ("predict", "a", 126),
            ("label", "b", 5, 1),
            ("predict", "b", 5),
            ("label", "b", 5, 2),
            ("end", "a", 130),
            ("kill",),
            ("predict", "a", 10),
            ("end", "a", 140),
            ("predict", "c", 1),
            ("predict", "c", 200),
            ("predict", "c", 1),
        ]
    )
    own = asyncio.run(apply_steps(f"sqlite:///{tmp_path}/memory.db", steps))
    other = asyncio.run(apply_steps(cluster.url("joins"), steps))
    for mine, theirs in zip(own, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_newer_schema_is_rejected(template: Path, tmp_path: Path) -> None:
    """A database of a newer schema is rejected with the reason, and not changed."""
    path = tmp_path / "newer.db"
    shutil.copy(template, path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaRejected, match="schema 9999"):
        asyncio.run(apply_steps(f"sqlite:///{path}", []))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://a/b", "nonsense", "://"])
def test_invalid_database_url_is_rejected(url: str) -> None:
    """An unsupported database URL is rejected with the name of its setting."""
    with pytest.raises(SettingsRejected, match="ENGINE_HEALTH_DATABASE_URL"):
        parse_url(url)


def test_failed_write_does_not_fail_others(template: Path, tmp_path: Path) -> None:
    """An error within a shared transaction is raised to its caller, and the other writes are committed."""
    path = tmp_path / "memory.db"
    shutil.copy(template, path)

    def picky(_: Connection, items: Any) -> list[Any]:
        if "bad" in items:
            raise ValueError("bad")
        return list(items)

    async def ask() -> list[Any]:
        database, _ = opened(f"sqlite:///{path}")
        writes = [database.write(picky, item) for item in ("a", "bad", "b")]
        results = await asyncio.gather(*writes, return_exceptions=True)
        await database.close()
        return results

    first, failed, last = asyncio.run(ask())
    assert ("a", "b") == (first, last)
    assert isinstance(failed, ValueError)


def test_error_after_commit_affects_its_caller_only(template: Path, tmp_path: Path) -> None:
    """An error of a callback after the commit is raised to its caller, and the other callers are answered."""
    path = tmp_path / "memory.db"
    shutil.copy(template, path)

    def then(result: str) -> None:
        if result == "bad":
            raise ValueError("bad")

    async def ask() -> list[Any]:
        database, _ = opened(f"sqlite:///{path}")
        writes = [database.write(lambda _, items: list(items), item, then) for item in ("a", "bad", "b")]
        results = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 30)
        await database.close()
        return results

    first, failed, last = asyncio.run(ask())
    assert ("a", "b") == (first, last)
    assert isinstance(failed, ValueError)


def test_missing_database_file_is_reported_and_recovered(tmp_path: Path) -> None:
    """A missing file raises StoreUnavailable, and a restored file is used with all its rows."""
    path = tmp_path / "memory.db"

    async def ask() -> None:
        database, session = opened(f"sqlite:///{path}")
        work = partial(labels.record_outcomes, session)
        assert "pending" == (await database.write(work, OutcomeSubmission("a", 9, False, 1.0))).result
        for name in ("memory.db", "memory.db-wal", "memory.db-shm"):
            (tmp_path / name).rename(tmp_path / f"away-{name}")
        with pytest.raises(StoreUnavailable, match="does not exist any more"):
            await database.write(work, OutcomeSubmission("b", 9, False, 1.0))
        for name in ("memory.db", "memory.db-wal", "memory.db-shm"):
            (tmp_path / f"away-{name}").rename(tmp_path / name)
        assert "unchanged" == (await database.write(work, OutcomeSubmission("a", 9, False, 1.0))).result
        assert "pending" == (await database.write(work, OutcomeSubmission("b", 9, False, 1.0))).result
        await database.close()

    asyncio.run(ask())


def test_retention_deletes_expired_rows_only(tmp_path: Path) -> None:
    """Retention deletes the rows before a time, and no others."""
    steps: list[Step] = [("predict", "a", cycle) for cycle in range(10)]

    async def ask() -> int:
        await apply_steps(f"sqlite:///{tmp_path}/memory.db", steps)
        database, _ = opened(f"sqlite:///{tmp_path}/memory.db")
        assert 4 == await pruned(database, 4.0)
        assert 0 == await pruned(database, 4.0)
        left = await database.read(lambda connection: queries.counted(connection, DIGEST, CLASSES, None))
        await database.close()
        return len(left.created_at)

    assert 6 == asyncio.run(ask())


def test_stored_model_is_sufficient_to_read_its_logits(template: Path, tmp_path: Path) -> None:
    """Classes, thresholds, temperature and the rule of prediction sets are stored with the first prediction."""
    path = tmp_path / "memory.db"
    shutil.copy(template, path)
    asyncio.run(apply_steps(f"sqlite:///{path}", [("predict", "a", 1)]))
    with sqlite3.connect(path) as connection:
        ((text,),) = connection.execute("SELECT manifest FROM models").fetchall()
    stored = json.loads(text)
    assert list(MANIFEST.classes) == stored["classes"]
    assert [125.0, 50.0] == stored["rul_thresholds"]


def test_revised_labels_are_archived(template: Path, tmp_path: Path) -> None:
    """Each revised label is archived, also if all revisions are in one transaction."""
    path = tmp_path / "memory.db"
    shutil.copy(template, path)
    rows = [LabelSubmission(None, "a", 1, one_hot(k), True) for k in (0, 1, 2)]

    async def ask() -> list[str]:
        database, session = opened(f"sqlite:///{path}")
        answered = await database.write(partial(labels.record_labels, session), LabelWrite(rows, 1.0))
        again = [LabelSubmission(None, "a", 1, one_hot(0), True), LabelSubmission(None, "a", 1, one_hot(1), True)]
        answered_then = await database.write(partial(labels.record_labels, session), LabelWrite(again, 2.0))
        await database.close()
        return [result for result, _ in [*answered.results, *answered_then.results]]

    assert ["pending", *["revised"] * 4] == asyncio.run(ask())
    with sqlite3.connect(path) as connection:
        connection.row_factory = sqlite3.Row
        archived = connection.execute("SELECT * FROM revisions ORDER BY id").fetchall()
        ((stands,),) = connection.execute("SELECT label FROM truths").fetchall()
    expected = [(0, 1.0, 1.0), (1, 1.0, 1.0), (2, 1.0, 2.0), (0, 2.0, 2.0)]
    assert expected == [(int(np.frombuffer(row["label"]).argmax()), row["told"], row["revised"]) for row in archived]
    assert 1 == np.frombuffer(stands).argmax()


def test_label_does_not_expire_before_its_prediction(tmp_path: Path) -> None:
    """An inspection that arrived before its prediction takes precedence over a failure reported later."""
    steps: list[Step] = [("label", "a", 1, 2, False), ("predict", "a", 5), ("predict", "a", 1)]

    async def ask() -> Floats:
        await apply_steps(f"sqlite:///{tmp_path}/memory.db", steps)
        database, session = opened(f"sqlite:///{tmp_path}/memory.db")
        assert 0 == await pruned(database, 1.0)
        await database.write(partial(labels.record_outcomes, session), OutcomeSubmission("a", 200, False, 9.0))
        left = await database.read(lambda connection: queries.counted(connection, DIGEST, CLASSES, None))
        await database.close()
        return np.asarray(left.label[left.source == 0])

    assert one_hot(2).tolist() == asyncio.run(ask())[0].tolist()


def test_engine_after_retention_shows_its_newest_row(tmp_path: Path) -> None:
    """If the latest prediction expired, the newest remaining one is the latest; a lower cycle may follow."""
    steps: list[Step] = [("predict", "a", 9), ("predict", "b", 9), ("predict", "a", 5), ("predict", "a", 3)]

    async def ask() -> list[tuple[str, int]]:
        await apply_steps(f"sqlite:///{tmp_path}/memory.db", steps)
        database, session = opened(f"sqlite:///{tmp_path}/memory.db")
        assert 2 == await pruned(database, 2.0)
        prediction = NewPrediction("f" * 32, "b", 1, logits_of("b", 1), None, 0, 0.1, None)
        await database.write(
            partial(predictions.record_predictions, session),
            PredictionWrite(ModelVersion(DIGEST, MANIFEST, 1.0, "artefact"), 9.0, [prediction]),
        )
        page = await database.read(lambda connection: queries.page(connection, EngineQuery()))
        await database.close()
        logits = np.frombuffer(logits_of("a", 5), np.float32)
        assert {np.exp(log_softmax(logits))[-1], 0.1} == {row.risk for row in page.rows}
        return sorted((row.engine_id, row.cycle) for row in page.rows)

    assert [("a", 5), ("b", 1)] == asyncio.run(ask())


def test_page_counts_the_engines_that_it_shows(tmp_path: Path) -> None:
    """An engine whose latest prediction expired is neither listed nor counted."""
    steps: list[Step] = [("predict", "a", 5), ("predict", "b", 5)]

    async def ask() -> EnginePage:
        await apply_steps(f"sqlite:///{tmp_path}/memory.db", steps)
        database, _ = opened(f"sqlite:///{tmp_path}/memory.db")
        assert 1 == await pruned(database, 1.0)
        page = await database.read(lambda connection: queries.page(connection, EngineQuery()))
        await database.close()
        return page

    page = asyncio.run(ask())
    assert (1, ["b"]) == (page.total, [row.engine_id for row in page.rows])


def test_continued_operation_labels_a_later_model(tmp_path: Path) -> None:
    """Continued operation labels predictions of a model although a model without RUL came first."""
    knows_none = ModelVersion("e" * 64, Manifest(name="other", version="1", classes=("x", "y", "z")), 1.0, "artefact")
    steps = [(knows_none, 0), *((ModelVersion(DIGEST, MANIFEST, 1.0, "artefact"), cycle) for cycle in (1, 2, 127, 128))]

    async def ask() -> list[int]:
        database, session = opened(f"sqlite:///{tmp_path}/memory.db")
        for k, (by, cycle) in enumerate(steps):
            prediction = NewPrediction(f"{k:032x}", "a", cycle, logits_of("a", cycle), None, 0, 0.5, None)
            await database.write(
                partial(predictions.record_predictions, session), PredictionWrite(by, float(k), [prediction])
            )
        counted = await database.read(lambda connection: queries.counted(connection, DIGEST, CLASSES, None))
        await database.close()
        return [int(source) for source in counted.source]

    assert [2, 2, -1, -1] == asyncio.run(ask())


def test_slow_query_is_no_outage(cluster: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query beyond the time limit raises StoreUnavailable, and the database still counts as available."""
    monkeypatch.setattr("service.store.sql.urls.SLOW_SECONDS", 1)

    async def ask() -> tuple[bool, str]:
        database, _ = opened(cluster.url("slowly"))
        await database.connect()
        with pytest.raises(StoreUnavailable) as error:
            await database.read(lambda connection: connection.execute(text("SELECT pg_sleep(30)")))
        up = database.up
        await database.close()
        return up, error.value.detail

    assert (True, "the query took longer than 1 s") == asyncio.run(ask())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_long_transaction_of_short_statements_is_committed(
    tmp_path: Path, cluster: Postgres, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A transaction may take longer than the limit of one statement."""
    monkeypatch.setattr("service.store.sql.database.STUCK_SECONDS", 0.6)

    def work(connection: Connection, items: Any) -> list[int]:
        if kind == "sqlite":
            raw: Any = connection.connection.dbapi_connection
            raw.create_function("pg_sleep", 1, time.sleep)
        for _ in range(12):
            connection.execute(text("SELECT pg_sleep(0.15)")).one()
        return [12] * len(items)

    async def run() -> int:
        database, _ = opened(f"sqlite:///{tmp_path}/long.db" if kind == "sqlite" else cluster.url("long"))
        await database.connect()
        try:
            return await database.write(work, None)
        finally:
            await database.close()

    assert 12 == asyncio.run(run())


def test_postgresql_timeouts_and_url_options_are_set(cluster: Postgres) -> None:
    """An unreachable host is dropped after 10 s, and options of the URL take precedence."""

    def look(connection: Connection) -> tuple[list[Any], int, int]:
        raw: Any = connection.connection.dbapi_connection
        with socket.socket(fileno=os.dup(raw.fileno())) as options:
            unanswered = options.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            idle = options.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        names = ("statement_timeout", "work_mem", "application_name")
        return [connection.execute(text(f"SHOW {name}")).scalar() for name in names], unanswered, idle

    async def ask() -> tuple[list[Any], int, int]:
        address = cluster.url("patience") + "?options=-c%20work_mem%3D9MB&application_name=mine&keepalives_idle=7"
        database, _ = opened(address)
        await database.connect()
        options = await database.read(look)
        await database.close()
        return options

    assert (["10s", "9MB", "mine"], 10_000, 7) == asyncio.run(ask())
