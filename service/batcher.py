"""Requests that arrive while the model is busy form the next batch: no timer, and nothing is waited for when idle.

Takes a callable over rows and knows no model. All state belongs to the event loop; the callable runs in a thread of
its own, one batch at a time. Batches are counted in rows and capped; a larger request is cut, and its pieces take turns
with whoever else waits, so that one window never waits for a thousand.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from service.errors import ClientGone, Overloaded

Rows = npt.NDArray[np.float32]
Columns = tuple[npt.NDArray[Any] | None, ...]  # each with one entry a row, or not there at all


class Observer(Protocol):
    """What is told of each batch and each caller; seconds."""

    def batch(self, rows: int, seconds: float) -> None:
        """One inference."""

    def waited(self, seconds: float) -> None:
        """One caller, from its arrival to the inference that answers its first row."""

    def answered(self, answered: list[tuple[Rows, Columns]]) -> None:
        """Callers whose last row is answered, before they hear of it."""


class _Job:
    """One caller: its rows, how many were answered, and whom to tell."""

    __slots__ = ("answered", "done", "gone", "parts", "rows", "since", "taken")

    def __init__(self, rows: Rows, done: "asyncio.Future[Columns]", gone: Callable[[], bool]) -> None:
        self.rows, self.done, self.gone = rows, done, gone
        self.since = time.perf_counter()
        self.taken = self.answered = 0
        self.parts: list[Columns] = []


class Batcher:
    """A bounded queue before one callable."""

    def __init__(
        self,
        run: Callable[[Rows], Columns],
        observer: Observer,
        max_batch_rows: int,
        max_queue_rows: int,
        max_queue_seconds: float,
    ) -> None:
        self.run = run
        self._observer, self._cap = observer, max_batch_rows
        self._most_rows, self._most_seconds = max_queue_rows, max_queue_seconds
        self._queue: deque[_Job] = deque()
        self._queued_rows = 0
        self._batches: queue.SimpleQueue[tuple[Rows, asyncio.Future[tuple[Columns, float]]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._infer, name="inference", daemon=True)
        self._thread.start()
        self._working: asyncio.Task[None] | None = None

    async def submit(self, rows: Rows, gone: Callable[[], bool] = lambda: False) -> Columns:
        """The answers for some rows, in their order.

        Args:
            rows: (N, ...) of which N may be more than a batch holds.
            gone: asked before each inference: whether the caller has left.

        Raises:
            Overloaded: the queue is full, or these rows grew too old in it.
            ClientGone: the caller left before its rows were taken.
        """
        if self._queue and self._queued_rows + len(rows) > self._most_rows:
            raise Overloaded(f"{self._queued_rows} rows wait, at most {self._most_rows} may", self._most_seconds)
        job = _Job(rows, asyncio.get_running_loop().create_future(), gone)
        self._queue.append(job)
        self._queued_rows += len(rows)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await job.done

    async def close(self) -> None:
        """Wait until everybody who was let in is answered, and end the thread."""
        while self._working is not None:
            await asyncio.wait({self._working})
        self._batches.put(None)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                pieces = self._next()
                if pieces:
                    batch = np.concatenate([rows for _, rows in pieces]) if len(pieces) > 1 else pieces[0][1]
                    started = time.perf_counter()
                    for job, _ in pieces:
                        if not job.parts and job.answered == 0:
                            self._observer.waited(started - job.since)
                    try:
                        done: asyncio.Future[tuple[Columns, float]] = loop.create_future()
                        self._batches.put((batch, done))
                        found, seconds = await done
                    except Exception as error:  # whatever the callable raises is its callers' to hear
                        _fail(pieces, error)
                    else:
                        self._observer.batch(len(batch), seconds)
                        self._hand_out(pieces, found)
        finally:
            self._working = None

    def _infer(self) -> None:
        """The thread's work: one batch after the other, until None."""
        while (given := self._batches.get()) is not None:
            batch, done = given
            started = time.perf_counter()
            try:
                found, error = self.run(batch), None
            except Exception as raised:  # the event loop hands it to those whom it concerns
                found, error = (), raised
            seconds = time.perf_counter() - started
            done.get_loop().call_soon_threadsafe(_tell, done, (found, seconds), error)

    def _next(self) -> list[tuple[_Job, Rows]]:
        """The pieces of the next batch; whoever left, gave up or waited too long is sent away instead."""
        pieces, room, now = [], self._cap, time.perf_counter()
        while self._queue and room:
            job = self._queue.popleft()
            if job.done.done() or self._refused(job, now):
                self._queued_rows -= len(job.rows) - job.taken
                continue
            rows = job.rows[job.taken : job.taken + room]
            job.taken += len(rows)
            room -= len(rows)
            self._queued_rows -= len(rows)
            pieces.append((job, rows))
            if job.taken < len(job.rows):
                self._queue.append(job)  # to the end: the others take their turn before its next piece
        return pieces

    def _hand_out(self, pieces: list[tuple[_Job, Rows]], found: Columns) -> None:
        """Each caller its own rows; a caller cut into pieces is answered with the last of them."""
        at, finished = 0, []
        for job, rows in pieces:
            job.parts.append(tuple(None if column is None else column[at : at + len(rows)] for column in found))
            at += len(rows)
            job.answered += len(rows)
            if job.answered == len(job.rows) and not job.done.done():
                finished.append((job, job.parts[0] if len(job.parts) == 1 else _joined(job.parts)))
        if finished:
            self._observer.answered([(job.rows, columns) for job, columns in finished])
        for job, columns in finished:
            job.done.set_result(columns)

    def _refused(self, job: _Job, now: float) -> bool:
        if job.gone():
            job.done.set_exception(ClientGone("the client left before its rows were taken"))
        elif job.taken == 0 and now - job.since > self._most_seconds:
            waited = f"waited {now - job.since:.1f} s, at most {self._most_seconds:g} are waited"
            job.done.set_exception(Overloaded(waited, self._most_seconds))
        return job.done.done()


def _tell(done: "asyncio.Future[tuple[Columns, float]]", found: tuple[Columns, float], error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(found)
    else:
        done.set_exception(error)


def _fail(pieces: list[tuple[_Job, Rows]], error: Exception) -> None:
    for job, _ in pieces:
        if not job.done.done():
            job.done.set_exception(error)


def _joined(parts: list[Columns]) -> Columns:
    columns = zip(*parts, strict=True)
    return tuple(None if column[0] is None else np.concatenate(column) for column in columns)
