"""Work that is begun at once instead of in a turn of its own. Knows no HTTP."""

import asyncio
import contextvars
import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any

Work = Coroutine[Any, Any, None]


def begin(loop: asyncio.AbstractEventLoop, work: Work) -> asyncio.Task[None] | None:
    """Do what a coroutine does before it first waits; the task that does the rest, None if nothing is left.

    Until it waits it has no current task: it may not use what asks for one, `asyncio.timeout` say. What it first waits
    for must be its own: two that are begun may not wait for one future.
    """
    context = contextvars.copy_context()
    try:
        awaited = context.run(work.send, None)
    except StopIteration:
        return None
    rest = _rest(_resumed(work, awaited))
    rest.send(None)
    return loop.create_task(rest, context=context)


async def _rest(resumed: Awaitable[None]) -> None:
    await resumed


@types.coroutine
def _resumed(work: Work, awaited: Any) -> Generator[Any, Any, None]:
    """What `await work` would be, from where it waits for `awaited`; begun once before its task is made.

    So a cancellation before that task's first turn is heard by `work`. Nothing here holds what was waited for once it
    has failed: its error holds this frame, and both would wait for a collection.
    """
    waits = None
    try:
        while True:
            try:
                heard = yield waits
            except BaseException as error:
                waits = awaited = None
                waits = work.throw(error)
            else:
                waits, awaited = (work.send(heard) if awaited is None else awaited), None
    except StopIteration:
        return
