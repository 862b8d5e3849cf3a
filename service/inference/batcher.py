"""Requests that arrive while the model is busy form the next batch: no timer, and nothing is waited for when idle.

Takes a callable over rows and knows no model. The callable runs in a thread of the batcher's own. The event loop wakes
it once whatever came together is in the queue; while full batches wait it helps itself, so that it is kept busy when
the loop has its hands full. A lock guards what both touch. What the callable finds is nobody's to cut: each caller is
told where in it its rows are, so that what is made of a batch can be made once for all.

Batches are counted in rows and capped. Two lines wait: requests that fit in a batch, and larger ones, which are cut.
Each line is served in order, and they take turns: one window never waits for a thousand, and a request whose turn has
come is finished at half speed at worst, however many follow it.
"""

import asyncio
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from service.errors import ClientDisconnected, Overloaded, ServiceError

Rows = npt.NDArray[np.float32]
Output = TypeVar("Output")
MAX_NOTIFY_DELAY_SECONDS = (
    0.02  # seconds of batches of which the event loop hears together, if nobody waits for one of them
)
RATE_SAMPLES = 9  # full batches whose median says how fast rows are answered: one long pause says nothing


class BatchSlice(NamedTuple, Generic[Output]):
    """Some rows of what one inference found: those from `begin` on, before `end`."""

    found: Output
    begin: int
    end: int


class Observer(Protocol[Output]):
    """What is told of each batch and each caller; seconds."""

    def batch(self, rows: int, seconds: float) -> None:
        """One inference."""

    def waited(self, seconds: list[float]) -> None:
        """Callers of a batch, each from its arrival to the inference that answers its first row."""

    def answered(self, answered: list[tuple[Rows, list[BatchSlice[Output]]]]) -> None:
        """Callers whose last row is answered, before they hear of it; those who are a whole batch as one."""


class _Job(Generic[Output]):
    """One caller: its rows, how many are to be counted, were taken and answered, and whom to tell."""

    __slots__ = ("answered", "counted", "done", "gone", "parts", "patience", "rows", "settled", "since", "taken")

    def __init__(self, rows: Rows, counted: int, gone: Callable[[], bool], patience: float) -> None:
        self.rows, self.counted, self.gone, self.patience = rows, counted, gone, patience
        self.done: asyncio.Future[list[BatchSlice[Output]]] = asyncio.get_running_loop().create_future()
        self.since = time.perf_counter()
        self.taken = self.answered = 0
        self.settled = False
        self.parts: list[BatchSlice[Output]] = []

    def is_taken(self) -> bool:
        """Whether every row is in a batch."""
        return self.taken == len(self.rows)


class _Batch(NamedTuple, Generic[Output]):
    """The pieces of one inference, and who was sent away instead, and why; None for who had given up."""

    pieces: list[tuple[_Job[Output], Rows]]
    refused: list[tuple[_Job[Output], ServiceError | None]]


class _BatchResult(NamedTuple, Generic[Output]):
    """The rows of an inference, what it found, when it began and the seconds it took."""

    rows: Rows
    found: Output
    started: float
    seconds: float


class Batcher(Generic[Output]):
    """A bounded queue before one callable."""

    def __init__(
        self,
        run: Callable[[Rows], Output],
        observer: Observer[Output],
        max_batch_rows: int,
        max_queue_rows: int,
        max_queue_seconds: float,
    ) -> None:
        self.run = run
        self._observer, self._cap = observer, max_batch_rows
        self._most_rows, self._most_seconds = max_queue_rows, max_queue_seconds
        self._lock = threading.Lock()
        # those who fit in a batch, and those who are cut
        self._lines: tuple[deque[_Job[Output]], deque[_Job[Output]]] = (deque(), deque())
        self._waiting = [0, 0]  # rows in each line
        self._turn = 0
        self._idle = True  # the thread waits to be woken
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False ends the thread
        self._thread: threading.Thread | None = None
        self._paces: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._row_seconds = 0.0  # until a full batch is seen, rows are thought to take no time
        self._callers = 0
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._closed = False

    def check_room(self, rows: int, other_delay: float = 0.0) -> None:
        """Let so many rows in, or not: a request is best refused before it has cost anything.

        Args:
            rows: of the request.
            other_delay: seconds that it waits outside of this queue.

        Raises:
            Overloaded: there is no room for them, or their turn would come later than anybody may wait.
        """
        waiting, line = sum(self._waiting), rows > self._cap
        if waiting and waiting + rows > self._most_rows:
            raise Overloaded(f"inference queue is full ({waiting} of {self._most_rows} rows)", self._most_seconds)
        before = self._waiting[line] + min(self._waiting)  # the other line takes every second turn while it lasts
        seconds = before * self._row_seconds + other_delay
        if seconds > self._most_seconds:
            detail = f"inference queue is too long: {before} rows, {seconds:.1f} s of at most {self._most_seconds:g} s"
            raise Overloaded(detail, self._most_seconds)

    async def submit(
        self,
        rows: Rows,
        gone: Callable[[], bool] = lambda: False,
        other_delay: float = 0.0,
        counted: int | None = None,
    ) -> list[BatchSlice[Output]]:
        """Where the answers for some rows are, in their order.

        Args:
            rows: (N, ...) of which N may be more than a batch holds.
            gone: asked before each inference, in another thread: whether the caller has left.
            other_delay: seconds that these rows wait outside of this queue.
            counted: of how many of them, the first, the observer hears; of all if not given.

        Raises:
            Overloaded: the queue is full, or these rows grew too old in it.
            ClientDisconnected: the caller left before its rows were taken.
        """
        self.check_room(len(rows), other_delay)
        job: _Job[Output] = _Job(
            rows, len(rows) if counted is None else counted, gone, self._most_seconds - other_delay
        )
        line = len(rows) > self._cap
        self._callers += 1
        self._nobody.clear()
        with self._lock:
            self._lines[line].append(job)
            self._waiting[line] += len(rows)
        self._rouse()
        return await job.done

    async def close(self) -> None:
        """Wait until everybody who was let in is answered, and end the thread; who comes later is answered still."""
        self._closed = True
        await self._nobody.wait()
        self._end()

    def _rouse(self) -> None:
        """Wake the thread if it is idle: in a moment, so that those who come together are a batch."""
        if self._idle and any(self._waiting):
            self._idle = False
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        if self._thread is None:
            self._wake = queue.SimpleQueue()  # its own: the thread before may not have read its last word yet
            of = (asyncio.get_running_loop(), self._wake)
            self._thread = threading.Thread(target=self._infer, args=of, name="inference", daemon=True)
            self._thread.start()
        self._wake.put(True)

    def _end(self) -> None:
        if self._thread is not None:
            self._wake.put(False)
            self._thread = None

    def _infer(self, loop: asyncio.AbstractEventLoop, wake: "queue.SimpleQueue[bool]") -> None:
        """The thread's work: whenever it is woken, whatever waits."""
        while wake.get():
            self._serve(loop)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """A batch, and others while they are full; the event loop sees to the rest.

        It is told of a batch that is the last of no caller together with one that is, or that no other follows, but
        never much later: whoever comes is told by the batches before how long it would wait.
        """
        batch, untold = self._next(1), list[tuple[_Batch[Output], _BatchResult[Output] | Exception | None]]()
        since = 0.0
        while batch is not None:
            told: _BatchResult[Output] | Exception | None = None
            started = time.perf_counter()
            try:
                if batch.pieces:
                    parts = [rows for _, rows in batch.pieces]
                    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
                    told = _BatchResult(rows, self.run(rows), started, time.perf_counter() - started)
            except Exception as raised:  # whatever the callable raises is its callers' to hear
                told = raised
            since = since if untold else started
            untold.append((batch, told))
            last = batch.refused or not isinstance(told, _BatchResult) or any(job.is_taken() for job, _ in batch.pieces)
            batch = self._next(self._cap)  # before the loop hears of this one: it wakes a thread that is idle by then
            if last or batch is None or time.perf_counter() - since > MAX_NOTIFY_DELAY_SECONDS:
                try:
                    loop.call_soon_threadsafe(self._tell, untold)
                except RuntimeError:  # the loop has ended, and with it whoever waited
                    return
                untold = []

    def _next(self, least: int) -> _Batch[Output] | None:
        """The next batch, the lines in turn; the room that one leaves is the other's. None if fewer rows wait."""
        with self._lock:
            if sum(self._waiting) < least:
                self._idle = True
                return None
            batch: _Batch[Output] = _Batch([], [])
            self._turn = 1 - self._turn
            left = self._take(self._turn, self._cap, batch)
            self._take(1 - self._turn, left, batch)
            return batch

    def _take(self, line: int, room: int, batch: _Batch[Output]) -> int:
        """Pieces from the head of a line, in which nobody stays who left, gave up or waited too long; the room left."""
        jobs, now = self._lines[line], time.perf_counter()
        while jobs and room:
            job = jobs[0]
            refusal = self._refusal(job, now)
            if refusal is not None or job.done.done():
                self._waiting[line] -= len(job.rows) - job.taken
                batch.refused.append((jobs.popleft(), refusal))
                continue
            rows = job.rows[job.taken : job.taken + room]
            job.taken += len(rows)
            room -= len(rows)
            self._waiting[line] -= len(rows)
            batch.pieces.append((job, rows))
            if job.is_taken():
                jobs.popleft()
        return room

    def _refusal(self, job: _Job[Output], now: float) -> ServiceError | None:
        if job.gone():
            return ClientDisconnected("the client left before its rows were taken")
        if job.taken == 0 and now - job.since > job.patience:
            waited = f"waited {now - job.since:.1f} s in the inference queue, at most {job.patience:.1f} s"
            return Overloaded(waited, self._most_seconds)
        return None

    def _tell(self, untold: list[tuple[_Batch[Output], _BatchResult[Output] | Exception | None]]) -> None:
        """What became of some batches, told in the event loop."""
        for batch, told in untold:
            for job, refusal in batch.refused:
                self._settle(job, refusal)
            if isinstance(told, _BatchResult):
                try:
                    self._answer(batch.pieces, told)
                except Exception as raised:  # as above; nobody is left waiting
                    told = raised
            if isinstance(told, Exception):
                for job, _ in batch.pieces:
                    self._settle(job, told)
        self._rouse()

    def _answer(self, pieces: list[tuple[_Job[Output], Rows]], told: _BatchResult[Output]) -> None:
        """Each caller its own rows; a caller cut into pieces is answered with the last of them."""
        at, finished, together = 0, [], True
        waits = [told.started - job.since for job, _ in pieces if not job.parts]
        for job, rows in pieces:
            n = len(rows)
            job.parts.append(BatchSlice(told.found, at, at + n))
            at += n
            job.answered += n
            if job.answered == len(job.rows):
                finished.append(job)
            together = together and n == job.answered == len(job.rows) == job.counted and not job.done.done()
        if at == self._cap:
            self._paces.append(told.seconds / at)
            self._row_seconds = statistics.median(self._paces)
        self._observer.batch(at, told.seconds)
        if waits:
            self._observer.waited(waits)
        if together:
            self._observer.answered([(told.rows, [BatchSlice(told.found, 0, at)])])
        elif heard := [_counted(job) for job in finished if not job.done.done()]:
            self._observer.answered(heard)
        for job in finished:
            self._settle(job)

    def _settle(self, job: _Job[Output], error: Exception | None = None) -> None:
        """Tell one caller, once."""
        if job.settled:
            return
        job.settled = True
        if not job.done.done():
            if error is None:
                job.done.set_result(job.parts)
            else:
                job.done.set_exception(error)
        self._callers -= 1
        if not self._callers:
            self._nobody.set()
            if self._closed:
                self._end()


def _counted(job: _Job[Output]) -> tuple[Rows, list[BatchSlice[Output]]]:
    """The rows of a caller that are to be counted, and where their answers are."""
    left, parts = job.counted, []
    for part in job.parts:
        if left > 0:
            parts.append(BatchSlice(part.found, part.begin, min(part.end, part.begin + left)))
        left -= part.end - part.begin
    return job.rows[: job.counted], parts
