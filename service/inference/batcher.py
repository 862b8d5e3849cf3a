"""Dynamic batching: requests that arrive while the model is busy form the next batch, without a timer.

Takes a callable over rows and is independent of the model. The callable runs in a thread of the batcher. The event loop
wakes the thread once the requests of one turn are queued. While full batches wait, the thread takes them without the
loop. A lock guards the state that both change. Each caller receives slices of batch outputs, so that values derived
from an output are computed once for all its callers.

Batches are counted in rows and capped. There are two queues: requests that fit in a batch, and larger ones, which are
split. Each queue is served in order, and the two alternate: a window never waits for all of a large request, and a
large request is processed at half speed at worst.
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
MAX_NOTIFY_DELAY_SECONDS = 0.02  # batches that complete no caller are delivered together after this time
RATE_SAMPLES = 9  # full batches whose median is the time per row: one long pause does not change it


class BatchSlice(NamedTuple, Generic[Output]):
    """The rows `begin` <= row < `end` of the output of one inference."""

    output: Output
    begin: int
    end: int


class Observer(Protocol[Output]):
    """Receives each batch, and the callers that it completes."""

    def batch(
        self, rows: int, seconds: float, waits: list[float], completed: list[tuple[Rows, list[BatchSlice[Output]]]]
    ) -> None:
        """Record one inference of `seconds`, and the callers that it completes, before they resume.

        Args:
            rows: number of rows of the batch.
            seconds: duration of the inference.
            waits: seconds from arrival to the start of the inference, of each caller whose first row is in the batch.
            completed: counted rows and their outputs, by caller; callers that are one whole batch are passed as one.
        """


class _Job(Generic[Output]):
    """One caller: its rows, the numbers of counted, taken and answered rows, and the future of its slices."""

    __slots__ = (
        "answered",
        "arrived",
        "completed",
        "counted",
        "done",
        "is_disconnected",
        "max_wait",
        "rows",
        "slices",
        "taken",
    )

    def __init__(self, rows: Rows, counted: int, is_disconnected: Callable[[], bool], max_wait: float) -> None:
        self.rows, self.counted, self.is_disconnected, self.max_wait = rows, counted, is_disconnected, max_wait
        self.done: asyncio.Future[list[BatchSlice[Output]]] = asyncio.get_running_loop().create_future()
        self.arrived = time.perf_counter()
        self.taken = self.answered = 0
        self.completed = False
        self.slices: list[BatchSlice[Output]] = []


class _Batch(NamedTuple, Generic[Output]):
    """The rows of one inference by caller, and the callers refused instead (None: it was cancelled)."""

    pieces: list[tuple[_Job[Output], Rows]]
    refused: list[tuple[_Job[Output], ServiceError | None]]
    completes: bool  # whether the last row of a caller is in the batch


class _BatchResult(NamedTuple, Generic[Output]):
    """The rows and the output of one inference, its start and its duration in seconds."""

    rows: Rows
    output: Output
    started: float
    seconds: float


class Batcher(Generic[Output]):
    """A bounded queue in front of one callable."""

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
        self._max_rows, self._max_seconds = max_queue_rows, max_queue_seconds
        self._lock = threading.Lock()
        # requests that fit in a batch, and larger ones
        self._lines: tuple[deque[_Job[Output]], deque[_Job[Output]]] = (deque(), deque())
        self._waiting = [0, 0]  # rows in each line
        self._turn = 0
        self._idle = True  # the thread waits to be woken
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False ends the thread
        self._thread: threading.Thread | None = None
        self._seconds_per_row: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._row_seconds = 0.0  # 0 until the first full batch
        self._callers = 0
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        self._closed = False

    def check_capacity(self, rows: int, other_delay: float = 0.0) -> None:
        """Check that `rows` more rows fit in the queue and would be answered in time.

        Args:
            rows: of the request.
            other_delay: seconds that the request waits outside of this queue.

        Raises:
            Overloaded: the queue is full, or its expected delay exceeds the longest wait.
        """
        waiting, line = sum(self._waiting), rows > self._cap
        if waiting and waiting + rows > self._max_rows:
            raise Overloaded(f"inference queue is full ({waiting} of {self._max_rows} rows)", self._max_seconds)
        before = self._waiting[line] + min(self._waiting)  # the other line takes every second turn while it lasts
        seconds = before * self._row_seconds + other_delay
        if seconds > self._max_seconds:
            detail = f"inference queue is too long: {before} rows, {seconds:.1f} s of at most {self._max_seconds:g} s"
            raise Overloaded(detail, self._max_seconds)

    async def submit(
        self,
        rows: Rows,
        is_disconnected: Callable[[], bool] = lambda: False,
        other_delay: float = 0.0,
        counted: int | None = None,
    ) -> list[BatchSlice[Output]]:
        """Queue rows and return the slices of the outputs for them, in order.

        Args:
            rows: (N, ...) of which N may be more than a batch holds.
            is_disconnected: called in the inference thread before each inference; whether the client left.
            other_delay: seconds that these rows wait outside of this queue.
            counted: number of leading rows that the observer receives; all by default.

        Raises:
            Overloaded: the queue is full, or these rows waited too long in it.
            ClientDisconnected: the caller left before its rows were taken.
        """
        self.check_capacity(len(rows), other_delay)
        job: _Job[Output] = _Job(
            rows, len(rows) if counted is None else counted, is_disconnected, self._max_seconds - other_delay
        )
        line = len(rows) > self._cap
        self._callers += 1
        self._all_answered.clear()
        with self._lock:
            self._lines[line].append(job)
            self._waiting[line] += len(rows)
        self._wake_if_idle()
        return await job.done

    async def close(self) -> None:
        """Wait until all admitted requests are answered, and stop the thread. Later requests are still answered."""
        self._closed = True
        await self._all_answered.wait()
        self._stop_thread()

    def _wake_if_idle(self) -> None:
        """Wake an idle thread at the end of this turn, so that the requests of the turn form one batch."""
        if self._idle and any(self._waiting):
            self._idle = False
            asyncio.get_running_loop().call_soon(self._start_or_wake)

    def _start_or_wake(self) -> None:
        if self._thread is None:
            self._wake = queue.SimpleQueue()  # a new queue: the previous thread may not have read its last message yet
            arguments = (asyncio.get_running_loop(), self._wake)
            self._thread = threading.Thread(target=self._infer, args=arguments, name="inference", daemon=True)
            self._thread.start()
        self._wake.put(True)

    def _stop_thread(self) -> None:
        if self._thread is not None:
            self._wake.put(False)
            self._thread = None

    def _infer(self, loop: asyncio.AbstractEventLoop, wake: "queue.SimpleQueue[bool]") -> None:
        """Run the waiting batches whenever the thread is woken."""
        while wake.get():
            self._serve(loop)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run one batch, and further ones while they are full; the event loop starts the next run.

        A batch that completes no caller is delivered with a later one, at most `MAX_NOTIFY_DELAY_SECONDS` later: the
        expected delay of new requests is computed from delivered batches.
        """
        batch, undelivered = self._next(1), list[tuple[_Batch[Output], _BatchResult[Output] | Exception | None]]()
        first_started = 0.0
        while batch is not None:
            result: _BatchResult[Output] | Exception | None = None
            started = time.perf_counter()
            try:
                if batch.pieces:
                    rows = batch.pieces[0][1]
                    if len(batch.pieces) > 1:
                        rows = np.concatenate([part for _, part in batch.pieces])
                    result = _BatchResult(rows, self.run(rows), started, time.perf_counter() - started)
            except Exception as raised:  # any exception of the callable is raised to the callers
                result = raised
            first_started = first_started if undelivered else started
            undelivered.append((batch, result))
            completes = batch.completes or batch.refused or not isinstance(result, _BatchResult)
            batch = self._next(self._cap)  # before the delivery, which wakes a thread that is idle by then
            if completes or batch is None or time.perf_counter() - first_started > MAX_NOTIFY_DELAY_SECONDS:
                try:
                    loop.call_soon_threadsafe(self._deliver, undelivered)
                except RuntimeError:  # the loop is closed, and all callers with it
                    return
                undelivered = []

    def _next(self, min_rows: int) -> _Batch[Output] | None:
        """Return the next batch, filled from both queues in turn; None if fewer than `min_rows` rows wait."""
        with self._lock:
            if self._waiting[0] + self._waiting[1] < min_rows:
                self._idle = True
                return None
            pieces: list[tuple[_Job[Output], Rows]] = []
            refused: list[tuple[_Job[Output], ServiceError | None]] = []
            completes, left = False, self._cap
            self._turn = 1 - self._turn
            for line in (self._turn, 1 - self._turn):
                if left and self._lines[line]:
                    left, completed = self._take(line, left, pieces, refused)
                    completes = completes or completed
            return _Batch(pieces, refused, completes)

    def _take(
        self,
        line: int,
        left: int,
        pieces: list[tuple[_Job[Output], Rows]],
        refused: list[tuple[_Job[Output], ServiceError | None]],
    ) -> tuple[int, bool]:
        """Move up to `left` rows from the head of a queue to `pieces`, and callers without a claim to `refused`.

        Returns the rows that are left, and whether all rows of a caller are now taken.
        """
        jobs, now, completes = self._lines[line], time.perf_counter(), False
        while jobs and left:
            job = jobs[0]
            refusal: ServiceError | None = None
            if job.is_disconnected():
                refusal = ClientDisconnected("the client left before its rows were taken")
            elif job.taken == 0 and now - job.arrived > job.max_wait:
                waited = f"waited {now - job.arrived:.1f} s in the inference queue, at most {job.max_wait:.1f} s"
                refusal = Overloaded(waited, self._max_seconds)
            if refusal is not None or job.done.done():
                self._waiting[line] -= len(job.rows) - job.taken
                refused.append((jobs.popleft(), refusal))
                continue
            rows = job.rows[job.taken : job.taken + left]
            job.taken += len(rows)
            left -= len(rows)
            self._waiting[line] -= len(rows)
            pieces.append((job, rows))
            if job.taken == len(job.rows):
                completes = True
                jobs.popleft()
        return left, completes

    def _deliver(self, undelivered: list[tuple[_Batch[Output], _BatchResult[Output] | Exception | None]]) -> None:
        """Give the results of some batches to their callers; runs in the event loop."""
        for batch, result in undelivered:
            for job, refusal in batch.refused:
                self._complete(job, refusal)
            if isinstance(result, _BatchResult):
                try:
                    self._answer(batch.pieces, result)
                except Exception as raised:  # as above; no caller waits forever
                    result = raised
            if isinstance(result, Exception):
                for job, _ in batch.pieces:
                    self._complete(job, result)
        self._wake_if_idle()

    def _answer(self, pieces: list[tuple[_Job[Output], Rows]], result: _BatchResult[Output]) -> None:
        """Give each caller its slice; a caller in several batches is answered with its last slice."""
        end, finished, waits, all_whole = 0, list[_Job[Output]](), list[float](), True
        for job, rows in pieces:
            count = len(rows)
            if not job.slices:
                waits.append(result.started - job.arrived)
            job.slices.append(BatchSlice(result.output, end, end + count))
            end += count
            job.answered += count
            if job.answered == len(job.rows):
                finished.append(job)
            all_whole = all_whole and count == job.answered == len(job.rows) == job.counted and not job.done.done()
        if end == self._cap:
            self._seconds_per_row.append(result.seconds / end)
            self._row_seconds = statistics.median(self._seconds_per_row)
        if all_whole:
            completed = [(result.rows, [BatchSlice(result.output, 0, end)])]
        else:
            completed = [_counted(job) for job in finished if job.counted and not job.done.done()]
        self._observer.batch(end, result.seconds, waits, completed)
        for job in finished:
            self._complete(job)

    def _complete(self, job: _Job[Output], error: Exception | None = None) -> None:
        """Set the result or the error of one caller, the first time only."""
        if job.completed:
            return
        job.completed = True
        if not job.done.done():
            if error is None:
                job.done.set_result(job.slices)
            else:
                job.done.set_exception(error)
        self._callers -= 1
        if not self._callers:
            self._all_answered.set()
            if self._closed:
                self._stop_thread()


def _counted(job: _Job[Output]) -> tuple[Rows, list[BatchSlice[Output]]]:
    """Return the counted rows of a caller, and the slices of their outputs."""
    left, slices = job.counted, []
    for part in job.slices:
        if left > 0:
            slices.append(BatchSlice(part.output, part.begin, min(part.end, part.begin + left)))
        left -= part.end - part.begin
    return job.rows[: job.counted], slices
