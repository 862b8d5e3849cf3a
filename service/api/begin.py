"""Work that is begun at once instead of in a turn of its own. Knows no HTTP."""

import asyncio
import contextvars
import types
from collections.abc import Coroutine, Generator
from typing import Any

Work = Coroutine[Any, Any, None]


def begin(loop: asyncio.AbstractEventLoop, work: Work) -> asyncio.Task[None] | None:
    """Do what a coroutine does before it first waits; the task that does the rest, None if nothing is left.

    Until it waits it has no current task: it may not use what asks for one, `asyncio.timeout` say.
    """
    context = contextvars.copy_context()
    try:
        awaited = context.run(work.send, None)
    except StopIteration:
        return None
    return loop.create_task(_rest(work, awaited), context=context)


async def _rest(work: Work, awaited: Any) -> None:
    await _resumed(work, awaited)


@types.coroutine
def _resumed(work: Work, awaited: Any) -> Generator[Any, Any, None]:
    """What `await work` would be, from where it waits for `awaited`."""
    try:
        while True:
            try:
                heard = yield awaited
            except BaseException as error:  # a cancellation, say: it is for `work` to see
                awaited = work.throw(error)
            else:
                awaited = work.send(heard)
    except StopIteration:
        return
