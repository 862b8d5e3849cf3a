"""Connections to SQLite or PostgreSQL: migration, one writing thread with group commit, and reading threads.

Writes that arrive during a commit form the next transaction. Callers receive their results after the commit.
Independent of tables.
"""

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from service.errors import Overloaded, StoreUnavailable
from service.store.sql import urls
from service.store.sql.migrate import migrate

LOCK_SECONDS = 5.0  # maximum wait for a transaction of another process
STUCK_SECONDS = urls.SLOW_SECONDS + 1  # after which a server that sends neither a result nor an error is unavailable
READERS = 4
MAX_TRIES = 4  # of a transaction that PostgreSQL rolled back in favour of another one
MAX_TRANSACTION_WRITES = 256
MAX_TRANSACTION_ROWS = 4096  # beyond which a transaction takes no further write: windows of flights are in RAM together
TRANSIENT_SQLSTATES = ("40001", "40P01")  # serialization failure and deadlock: a retry may succeed
CANCELLED_SQLSTATE = "57014"  # the statement exceeded its timeout

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Connection, Sequence[Any]], Sequence[Any]]  # writes items of one kind, returns a result for each


class _Write(NamedTuple):
    """One call of `Database.write` that waits for its transaction."""

    work: Work
    item: Any
    done: "asyncio.Future[Any]"
    since: float
    committed: Callable[[Any], None] | None
    rows: int


_ITEM = attrgetter("item")


class Database:
    """The connections of one process to a database. `up` is whether the last transaction succeeded."""

    def __init__(
        self,
        url: str,
        rolled_back: Callable[[bool], None],
        max_queue: int,
        max_seconds: float,
        lock: Callable[[Connection, Sequence[Sequence[Any]]], None] | None = None,
    ) -> None:
        """Start the writing thread.

        Args:
            url: of the database.
            rolled_back: called after a failed transaction; True if the database may be another one from now on.
            max_queue: writes that may wait.
            max_seconds: time that a write may wait.
            lock: called at the start of a transaction with all its items, by kind of work. Not for SQLite, which has
                one writer.
        """
        self._url = urls.parse_url(url)
        self._file = str(self._url.database) if self._url.get_backend_name() == "sqlite" else None
        self._writing = _engine(self._url, "BEGIN IMMEDIATE", 1)
        self._reading = _engine(urls.existing_only(self._url), "BEGIN", READERS)
        self._readers = ThreadPoolExecutor(READERS, "store-reader")  # not the loop's pool: a query may wait for long
        self._waiting_since: float | None = None  # start of the writing thread's current statement
        event.listen(self._writing, "before_cursor_execute", self._note_progress)
        event.listen(self._writing, "commit", self._note_progress)
        self._rolled_back = rolled_back
        self._lock = lock if self._file is None else None
        self._inode: int | None = None  # of the file that was migrated
        self.up, self._reason = False, "the database does not respond"
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._turn: list[_Write] = []  # writes of this turn of the event loop, which form one transaction
        self._max_queue, self._max_seconds = max_queue, max_seconds
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)
        self._thread.start()

    async def write(
        self,
        work: Callable[[Connection, Sequence[Item]], Sequence[Result]],
        item: Item,
        committed: Callable[[Result], None] | None = None,
        rows: int = 1,
    ) -> Result:
        """Write in one transaction with all other waiting writes, and return the result once it is committed.

        Args:
            work: writes all items of its kind; it may be called again.
            item: of this caller.
            committed: called with the result once it is committed, even if this call was cancelled or has failed.
            rows: number of rows of the item.

        Raises:
            StoreUnavailable: the database cannot be reached, is locked, is full, or was so while this write waited.
            Overloaded: too many writes wait already, or this one waited too long.
        """
        if self._queue.qsize() + len(self._turn) >= self._max_queue:
            raise Overloaded(f"{self._max_queue} requests wait for the database, which is the limit", self._max_seconds)
        if not self.up and self._is_stuck():
            raise StoreUnavailable(self._reason)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        self._turn.append(_Write(work, item, done, time.monotonic(), committed, rows))
        if len(self._turn) == 1:
            loop.call_soon(self._hand_over)
        timer = loop.call_later(STUCK_SECONDS, self._give_up, loop, done)
        try:
            return await done
        finally:
            timer.cancel()

    async def connect(self) -> None:
        """Connect by an empty transaction, which creates or migrates the database if necessary.

        Raises:
            StoreUnavailable: as in `write`.
        """
        await self.write(_write_nothing, None)

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Run queries in one consistent view.

        Raises:
            StoreUnavailable: as in `write`.
        """
        result = asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)
        while not (await asyncio.wait({result}, timeout=STUCK_SECONDS))[0]:
            if not self.up:
                result.add_done_callback(lambda late: late.exception())  # marks the exception as retrieved
                raise StoreUnavailable(self._reason)
        return await result

    async def close(self) -> None:
        """Commit all accepted writes, and stop."""
        self._hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, STUCK_SECONDS)
        self._readers.shutdown(wait=False)
        self._writing.dispose()
        self._reading.dispose()

    def _hand_over(self) -> None:
        for write in self._turn:
            self._queue.put(write)
        self._turn = []

    def _note_progress(self, *_: object) -> None:
        self._waiting_since = time.monotonic()

    def _is_stuck(self) -> bool:
        since = self._waiting_since
        return since is not None and time.monotonic() - since >= STUCK_SECONDS

    def _give_up(self, loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Any]") -> None:
        """Fail a write if the database does not respond at all. Long work of this process does not count as that."""
        if done.done():
            return
        if not self._is_stuck():
            loop.call_later(1, self._give_up, loop, done)
            return
        self.up, self._reason = False, "the database does not respond"
        done.set_exception(StoreUnavailable(self._reason))

    def _read(self, work: Callable[[Connection], Result]) -> Result:
        try:
            if not self.up:
                raise StoreUnavailable(self._reason)
            with self._reading.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == CANCELLED_SQLSTATE:  # `up` stays: the database does respond
                message = f"the query took longer than {urls.SLOW_SECONDS} s"
                raise StoreUnavailable(message) from error
            raise self._unavailable(error) from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise self._unavailable(error) from error

    def _write(self) -> None:
        """Commit all waiting writes in one transaction, again and again. Runs in the writing thread."""
        while (first := self._queue.get()) is not None:
            writes, rows, last = [first], first.rows, False
            while (
                len(writes) < MAX_TRANSACTION_WRITES
                and rows < MAX_TRANSACTION_ROWS
                and not last
                and not self._queue.empty()
            ):
                following = self._queue.get()
                last = following is None
                writes += [following] if following else []
                rows += following.rows if following else 0
            oldest = time.monotonic() - self._max_seconds
            in_time, results = list[_Write](), list[tuple[_Write, Any]]()
            for write in writes:
                if write.since < oldest:
                    results.append((write, self._late_error()))
                else:
                    in_time.append(write)
            results += self._commit(in_time)
            loops: dict[asyncio.AbstractEventLoop, list[tuple[_Write, Any]]] = {}
            for pair in results:
                loops.setdefault(pair[0].done.get_loop(), []).append(pair)
            for loop, pairs in loops.items():
                loop.call_soon_threadsafe(_deliver, pairs)
            if last:
                return

    def _late_error(self) -> Exception:
        """Return the error of a write that waited too long: for other writes, or for an unavailable database."""
        if not self.up:
            return StoreUnavailable(self._reason)
        return Overloaded(f"waited {self._max_seconds:g} s for the database, no longer is waited", self._max_seconds)

    def _commit(self, writes: list[_Write]) -> list[tuple[_Write, Any]]:
        """Commit writes and return their results. If they fail together, each is tried alone."""
        if not writes:
            return []
        kinds: dict[Work, list[_Write]] = {}
        for write in writes:
            kinds.setdefault(write.work, []).append(write)
        try:
            return self._transaction(kinds, MAX_TRIES)
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            failure = self._unavailable(error)
        except StoreUnavailable as error:
            failure, self.up, self._reason = error, False, error.detail
        except Exception as error:  # possibly caused by one item only; the other writes must not fail with it
            failure = error
        self._rolled_back(isinstance(failure, StoreUnavailable))
        if isinstance(failure, StoreUnavailable) or len(writes) == 1:
            return [(write, failure) for write in writes]
        return [pair for write in writes for pair in self._commit([write])]

    def _transaction(self, kinds: dict[Work, list[_Write]], tries: int) -> list[tuple[_Write, Any]]:
        try:
            self._note_progress()
            self._check_file()
            results: list[tuple[_Write, Any]] = []
            with self._writing.begin() as connection:
                items = dict[Work, list[Any]]()
                for work, writes in kinds.items():
                    items[work] = list(map(_ITEM, writes))
                if self._lock is not None:
                    self._lock(connection, list(items.values()))
                for work, writes in kinds.items():
                    results += zip(writes, work(connection, items[work]), strict=True)
        except DBAPIError as error:
            if tries > 1 and getattr(error.orig, "sqlstate", None) in TRANSIENT_SQLSTATES:
                self._rolled_back(False)
                return self._transaction(kinds, tries - 1)
            raise
        finally:
            self._waiting_since = None
        self.up = True
        return results

    def _check_file(self) -> None:
        """Migrate the database on first use, and an SQLite file that has replaced another one.

        A deleted SQLite file that is open still accepts writes, which are lost. So each transaction checks the path.
        """
        if self._file is None:
            if not self.up:
                migrate(self._writing)
            return
        try:
            inode = os.stat(self._file).st_ino
        except FileNotFoundError:
            if self._inode is not None:
                raise StoreUnavailable(f"the database file {self._file} does not exist any more") from None
            inode = None  # it is created
        if inode is None or inode != self._inode:
            self._rolled_back(True)  # caches describe the previous file
            self._writing.dispose()
            self._reading.dispose()
            migrate(self._writing)
            self._inode = os.stat(self._file).st_ino

    def _unavailable(self, error: Exception) -> Exception:
        """Return a database error as `StoreUnavailable`. Errors in our use of SQLAlchemy are returned unchanged."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError):
            return error
        self.up = False
        self._reason = f"the database does not respond: {str(cause).strip().partition(chr(10))[0]}"
        return StoreUnavailable(self._reason)


def _write_nothing(_: Connection, items: Sequence[None]) -> Sequence[None]:
    return items


def _deliver(results: Sequence[tuple[_Write, Any]]) -> None:
    """Give results or errors to the callers. Runs in the event loop."""
    for write, result in results:
        if write.committed is not None and not isinstance(result, Exception):
            try:
                write.committed(result)
            except Exception as error:  # raised in its own caller; the others would wait for ever
                result = error
        if write.done.done():  # the caller was cancelled, or its write was given up
            continue
        if isinstance(result, Exception):
            write.done.set_exception(result)
        else:
            write.done.set_result(result)


def _engine(url: URL, begin: str, connections: int) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS, "check_same_thread": False})
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine
    return create_engine(urls.with_timeouts(url), pool_size=connections, max_overflow=0, pool_pre_ping=True)


def _configure(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions start where the code starts them, not implicitly
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # committed means on the disk
