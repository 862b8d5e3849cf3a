"""Connections: SQLite or PostgreSQL, migrated at start, one writing thread that commits for many at once, readers.

Work that arrives while a commit is under way forms the next transaction; whoever asked hears of it after the commit.
Knows transactions and no table.
"""

import asyncio
import os
import queue
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from service.errors import Overloaded, SettingsRejected, StoreUnavailable
from service.store.sql.migrate import migrate

LOCK_SECONDS = 5.0  # how long another process's transaction is waited for
SLOW_SECONDS = 10  # how long PostgreSQL may take to connect, or for one statement
STUCK_SECONDS = SLOW_SECONDS + 1  # after which a server that said nothing, not even that it failed, is given up
READERS = 4
TRIES = 4  # of a transaction that PostgreSQL gave up in favour of another one
MOST_WORK = 256  # requests of one transaction
MOST_ROWS = 4096  # and rows beyond which it takes no further request: windows of flights are in memory together
PASSING = ("40001", "40P01")  # SQLSTATE of serialization failure and deadlock: the same again may succeed
TOO_LONG = "57014"  # SQLSTATE of a statement that was cancelled after its time

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Connection, Sequence[Any]], Sequence[Any]]  # of many items of one kind, a result for each


class _Asked(NamedTuple):
    work: Work
    item: Any
    done: "asyncio.Future[Any]"
    since: float
    then: Callable[[Any], None] | None
    rows: int


_ITEM = attrgetter("item")


def address(text: str) -> URL:
    """A database's URL.

    Raises:
        SettingsRejected: none that this service can use.
    """
    try:
        url = make_url(text)
        kind = url.get_backend_name()
    except (ArgumentError, ValueError):
        raise SettingsRejected("ENGINE_HEALTH_DATABASE_URL is no URL like sqlite:///engine-health.db") from None
    if kind == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise SettingsRejected(f"ENGINE_HEALTH_DATABASE_URL: {kind[:40]} is not sqlite or postgresql")
    if url.database in (None, "", ":memory:"):
        raise SettingsRejected("ENGINE_HEALTH_DATABASE_URL: SQLite needs a file; leave it empty for no store at all")
    return url.set(drivername="sqlite")


class Database:
    """One database, seen from one process. `up` says whether the last transaction succeeded."""

    def __init__(
        self,
        url: str,
        failed: Callable[[bool], None],
        max_queue: int,
        max_seconds: float,
        begun: Callable[[Connection, Sequence[Sequence[Any]]], None] | None = None,
    ) -> None:
        self._url = address(url)
        self._file = str(self._url.database) if self._url.get_backend_name() == "sqlite" else None
        self._writing = _engine(self._url, "BEGIN IMMEDIATE", 1)
        self._reading = _engine(_there_only(self._url), "BEGIN", READERS)
        self._readers = ThreadPoolExecutor(READERS, "store-reader")  # of its own: one may wait for long
        self._waiting: float | None = None  # since when the writing thread waits for its statement
        event.listen(self._writing, "before_cursor_execute", self._wait)
        event.listen(self._writing, "commit", self._wait)
        self._failed = failed  # called when a transaction was not committed; True if the database may be another one
        self._begun = begun  # told of all items of a transaction, by kind of work, before any of it is done
        self._inode: int | None = None  # of the file that was migrated
        self.up, self._reason = False, "the database does not answer"
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._together: list[_Asked] = []  # of one turn of the event loop, so that they are one transaction
        self._most, self._seconds = max_queue, max_seconds
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)
        self._thread.start()

    async def write(
        self,
        work: Callable[[Connection, Sequence[Item]], Sequence[Result]],
        item: Item,
        then: Callable[[Result], None] | None = None,
        rows: int = 1,
    ) -> Result:
        """Do work in a transaction shared with whatever else waits; answered once that is committed.

        Args:
            work: what is done with all items of its kind; it may be done again.
            item: of this caller.
            then: told of the result once it is committed, also if the caller has left or was told that nobody answers.
            rows: of the item.

        Raises:
            StoreUnavailable: the database cannot be reached, is locked, or is full, or this waited for one that is.
            Overloaded: too many wait already, or this waited too long.
        """
        if self._queue.qsize() + len(self._together) >= self._most:
            raise Overloaded(f"{self._most} requests wait for the database, no more may", self._seconds)
        if not self.up and self._stuck():
            raise StoreUnavailable(self._reason)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        self._together.append(_Asked(work, item, done, time.monotonic(), then, rows))
        if len(self._together) == 1:
            loop.call_soon(self._hand_over)
        patience = loop.call_later(STUCK_SECONDS, self._lose_patience, loop, done)
        try:
            return await done
        finally:
            patience.cancel()

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Look something up in one consistent view.

        Raises:
            StoreUnavailable: as in `write`.
        """
        found = asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)
        while not (await asyncio.wait({found}, timeout=STUCK_SECONDS))[0]:
            if not self.up:
                found.add_done_callback(lambda late: late.exception())  # nobody is left to hear it
                raise StoreUnavailable(self._reason)
        return await found

    async def close(self) -> None:
        """Commit what was accepted, and end."""
        self._hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, STUCK_SECONDS)
        self._readers.shutdown(wait=False)
        self._writing.dispose()
        self._reading.dispose()

    def _hand_over(self) -> None:
        for asked in self._together:
            self._queue.put(asked)
        self._together = []

    def _wait(self, *_: object) -> None:
        self._waiting = time.monotonic()

    def _stuck(self) -> bool:
        since = self._waiting
        return since is not None and time.monotonic() - since >= STUCK_SECONDS

    def _lose_patience(self, loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Any]") -> None:
        """Give up a database that says nothing at all; work of ours that takes long is waited for."""
        if done.done():
            return
        if not self._stuck():
            loop.call_later(1, self._lose_patience, loop, done)
            return
        self.up, self._reason = False, "the database does not answer: it has been silent for too long"
        done.set_exception(StoreUnavailable(self._reason))

    def _read(self, work: Callable[[Connection], Result]) -> Result:
        try:
            if not self.up:
                raise StoreUnavailable(self._reason)
            with self._reading.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == TOO_LONG:  # it is there; who writes is not to think otherwise
                message = f"the database took longer than {SLOW_SECONDS} s to look this up"
                raise StoreUnavailable(message) from error
            raise self._unavailable(error) from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise self._unavailable(error) from error

    def _write(self) -> None:
        """The thread's work: whatever waits, in one transaction; then again."""
        while (first := self._queue.get()) is not None:
            asked, rows, last = [first], first.rows, False
            while len(asked) < MOST_WORK and rows < MOST_ROWS and not last and not self._queue.empty():
                found = self._queue.get()
                last = found is None
                asked += [found] if found else []
                rows += found.rows if found else 0
            late = time.monotonic() - self._seconds
            in_time, results = list[_Asked](), list[tuple[_Asked, Any]]()
            for one in asked:
                if one.since < late:
                    results.append((one, self._too_late()))
                else:
                    in_time.append(one)
            results += self._committed(in_time)
            loops: dict[asyncio.AbstractEventLoop, list[tuple[_Asked, Any]]] = {}
            for pair in results:
                loops.setdefault(pair[0].done.get_loop(), []).append(pair)
            for loop, pairs in loops.items():
                loop.call_soon_threadsafe(_tell, pairs)
            if last:
                return

    def _too_late(self) -> Exception:
        """What to tell who waited too long: for others, or for a database that does not answer."""
        if not self.up:
            return StoreUnavailable(self._reason)
        return Overloaded(f"waited {self._seconds:g} s for the database, no longer is waited", self._seconds)

    def _committed(self, asked: list[_Asked]) -> list[tuple[_Asked, Any]]:
        """The results, committed. What cannot be done together is done one by one, so that one fails nobody else."""
        if not asked:
            return []
        kinds: dict[Work, list[_Asked]] = {}
        for one in asked:
            kinds.setdefault(one.work, []).append(one)
        try:
            return self._transaction(kinds, TRIES)
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            failure = self._unavailable(error)
        except StoreUnavailable as error:
            failure, self.up, self._reason = error, False, error.detail
        except Exception as error:  # of one item, it may be; the others are not to suffer
            failure = error
        self._failed(isinstance(failure, StoreUnavailable))
        if isinstance(failure, StoreUnavailable) or len(asked) == 1:
            return [(one, failure) for one in asked]
        return [pair for one in asked for pair in self._committed([one])]

    def _transaction(self, kinds: dict[Work, list[_Asked]], tries: int) -> list[tuple[_Asked, Any]]:
        try:
            self._wait()
            self._find()
            done: list[tuple[_Asked, Any]] = []
            with self._writing.begin() as connection:
                items = dict[Work, list[Any]]()
                for work, asked in kinds.items():
                    items[work] = list(map(_ITEM, asked))
                if self._begun is not None:
                    self._begun(connection, list(items.values()))
                for work, asked in kinds.items():
                    done += zip(asked, work(connection, items[work]), strict=True)
        except DBAPIError as error:
            if tries > 1 and getattr(error.orig, "sqlstate", None) in PASSING:
                self._failed(False)
                return self._transaction(kinds, tries - 1)
            raise
        finally:
            self._waiting = None
        self.up = True
        return done

    def _find(self) -> None:
        """Migrate the database when it is met for the first time, and a file that took the place of another.

        An open SQLite file that was deleted goes on taking what nobody will ever read: it is looked for each time.
        """
        if self._file is None:
            if not self.up:
                migrate(self._writing)
            return
        try:
            inode = os.stat(self._file).st_ino
        except FileNotFoundError:
            if self._inode is not None:
                raise StoreUnavailable(f"the database file {self._file} is gone") from None
            inode = None  # it is created
        if inode is None or inode != self._inode:
            self._failed(True)  # what is cached is of the file before
            self._writing.dispose()
            self._reading.dispose()
            migrate(self._writing)
            self._inode = os.stat(self._file).st_ino

    def _unavailable(self, error: Exception) -> Exception:
        """What is wrong with the database as an error of this service; a fault of ours stays what it is."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError):
            return error
        self.up = False
        self._reason = f"the database does not answer: {str(cause).strip().partition(chr(10))[0]}"
        return StoreUnavailable(self._reason)


def _tell(told: Sequence[tuple[_Asked, Any]]) -> None:
    for one, result in told:
        if one.then is not None and not isinstance(result, Exception):
            try:
                one.then(result)
            except Exception as error:  # heard of by its own caller; the others would wait for ever
                result = error
        if one.done.done():  # whoever asked has left
            continue
        if isinstance(result, Exception):
            one.done.set_exception(result)
        else:
            one.done.set_result(result)


def _there_only(url: URL) -> URL:
    """The same database, but that looking something up makes no file where none is."""
    if url.get_backend_name() != "sqlite":
        return url
    query = {**url.query, "mode": "rw", "uri": "true"}
    return url.set(database=f"file:{urllib.parse.quote(str(url.database))}", query=query)


def _engine(url: URL, begin: str, connections: int) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS, "check_same_thread": False})
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine
    return create_engine(_patient(url), pool_size=connections, max_overflow=0, pool_pre_ping=True)


def _patient(url: URL) -> URL:
    """The same database, and how long it is waited for; what the address says itself stands.

    A host that vanished acknowledges nothing: the kernel gives its connections up, where it would wait for hours.
    """
    options = f"-c statement_timeout={SLOW_SECONDS}s {url.query.get('options', '')}".strip()
    slow = {"connect_timeout": str(SLOW_SECONDS), "tcp_user_timeout": str(SLOW_SECONDS * 1000)}  # milliseconds
    alive = {"keepalives_idle": "5", "keepalives_interval": "1", "keepalives_count": "5"}  # seconds
    return url.set(query={**slow, **alive, **url.query, "options": options})


def _configure(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions begin where they are said to, and not by guessing
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # committed means on the disk
