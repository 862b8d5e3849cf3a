import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.errors import Overloaded
from service.turns import LEAST, Turns

LONG = 0.1  # seconds: an eighth of what anybody may wait, which is what a turn may take


def play(scene: Callable[[Turns], Coroutine[Any, Any, None]]) -> None:
    async def begin() -> None:
        await scene(Turns(8 * LONG))

    asyncio.run(begin())


async def turn(turns: Turns, callers: int, seconds: float) -> int:
    """One turn of the loop in which so many callers come, each of whom costs that time; how many were taken in."""
    taken = 0
    for _ in range(callers):
        try:
            turns.check()
        except Overloaded:
            pass
        else:
            taken += 1
            time.sleep(seconds)  # the work of a turn holds the loop: that is the point
    await asyncio.sleep(0)
    return taken


def test_callers_who_cost_much_have_a_share_of_each_turn() -> None:
    """After turns that were too long fewer are taken in, never nobody; after short turns as many as at first."""

    async def scene(turns: Turns) -> None:
        first = await turn(turns, 100, LONG / 2)
        assert 1 < first < 10
        for _ in range(6):
            least = await turn(turns, 100, LONG / 2)
            time.sleep(LONG)  # as above
        assert 1 <= least < first
        assert 0 < turns.besides() <= 4 * LONG
        for _ in range(8):
            assert 1 == await turn(turns, 1, 0)
        assert least <= await turn(turns, 100, LONG / 2)

    play(scene)
    assert LEAST < 1


def test_callers_who_cost_little_are_always_taken_in() -> None:
    """To answer them costs no more than to refuse them: a thousand in a turn are let in, turn after turn."""

    async def scene(turns: Turns) -> None:
        for _ in range(5):
            assert 1000 == await turn(turns, 1000, 0)

    play(scene)


def test_it_is_crowded_after_a_turn_that_refused_somebody() -> None:
    """Until a turn refuses nobody; whether it was refused here, or elsewhere for want of room."""

    async def scene(turns: Turns) -> None:
        found = []
        for callers, cost, elsewhere in (
            (1, 0, False),
            (100, LONG / 2, False),
            (1, 0, False),
            (1, 0, True),
            (1, 0, False),
        ):
            if elsewhere:
                turns.refused()
            await turn(turns, callers, cost)
            found.append(turns.crowded)
        assert [False, True, False, True, False] == found

    play(scene)


def test_without_callers_nothing_is_waited_for() -> None:
    """Turns are only looked at while somebody comes: the first of many is taken in, however long ago the last was."""

    async def scene(turns: Turns) -> None:
        assert 1 == await turn(turns, 1, 5 * LONG)
        await asyncio.sleep(0)
        assert 1 == await turn(turns, 1, 0)

    play(scene)


@pytest.mark.parametrize("wait", [0.1, 2.0, 600.0])
def test_most_of_what_may_be_waited_is_the_queues(wait: float) -> None:
    """What is waited beside the queue never takes more than half of it."""

    async def scene() -> None:
        turns = Turns(wait)
        assert 0 == turns.besides()
        turns.seconds = 3600.0
        assert wait / 2 == turns.besides()

    asyncio.run(scene())
