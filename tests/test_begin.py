import asyncio
import contextvars
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from service.api.begin import begin

WHO = contextvars.ContextVar("WHO", default="nobody")


def test_what_never_waits_is_done_at_once() -> None:
    """A coroutine that waits for nothing has run before `begin` returns, and no task is made for it."""
    said: list[str] = []

    async def work() -> None:
        said.append("done")

    async def scene() -> None:
        assert begin(asyncio.get_running_loop(), work()) is None
        assert ["done"] == said

    asyncio.run(scene())


def test_what_waits_goes_on_as_a_task() -> None:
    """What is waited for is heard, in order; only the rest has a task; a context of its own is kept throughout."""
    heard: list[object] = []

    async def scene() -> None:
        first: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def work() -> None:
            WHO.set("work")
            heard.append(asyncio.current_task() is task_outside)
            heard.append(await first)
            async with asyncio.timeout(60):
                await asyncio.sleep(0)
            heard.append(WHO.get())

        task_outside = asyncio.current_task()
        task = begin(asyncio.get_running_loop(), work())
        assert task is not None
        assert "nobody" == WHO.get()
        first.set_result("word")
        await task

    asyncio.run(scene())
    assert [True, "word", "work"] == heard


@pytest.mark.parametrize("turns", [0, 1, 2])
@pytest.mark.parametrize("cancelled", [True, False])
def test_what_is_waited_for_may_fail(cancelled: bool, turns: int) -> None:
    """An error, or a cancellation however early, is raised where the coroutine waits; what it does then goes on."""

    async def scene() -> object:
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        found: list[object] = []

        async def work() -> None:
            try:
                await first
            except (KeyError, asyncio.CancelledError) as error:
                await asyncio.sleep(0)
                found.append(type(error))

        task = begin(asyncio.get_running_loop(), work())
        assert task is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        if cancelled:
            task.cancel()
        else:
            first.set_exception(KeyError())
        await task
        return found

    assert [asyncio.CancelledError if cancelled else KeyError] == asyncio.run(scene())


@pytest.mark.parametrize("caught", [True, False])
def test_a_failure_leaves_nothing_to_a_collection(caught: bool) -> None:
    """What was waited for, and failed, is forgotten with the task."""
    forgotten: list[bool] = []

    class Failure(Exception):
        pass

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        first: asyncio.Future[None] = loop.create_future()
        held = [first]

        async def work() -> None:
            try:
                await held.pop()
            except Failure:
                if not caught:
                    raise

        task = begin(loop, work())
        assert task is not None
        failure = Failure()
        weakref.finalize(failure, forgotten.append, True)
        first.set_exception(failure)
        del first, failure
        await asyncio.wait([task])
        assert caught == (task.exception() is None)
        del task
        await asyncio.sleep(0)

    gc.disable()
    try:
        asyncio.run(scene())
        assert [True] == forgotten
    finally:
        gc.enable()


def test_an_error_is_the_tasks_or_the_callers() -> None:
    """What is raised after waiting is the task's to tell; what is raised before is raised at once."""

    async def fail(first: Coroutine[Any, Any, None] | None) -> None:
        if first:
            await first
        raise KeyError

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(KeyError):
            begin(loop, fail(None))
        task = begin(loop, fail(asyncio.sleep(0)))
        assert task is not None
        with pytest.raises(KeyError):
            await task

    asyncio.run(scene())
