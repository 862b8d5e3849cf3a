"""Offload long work from the event loop to one thread."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE_BODY = 64 * 1024  # bytes; longer bodies are parsed outside of the event loop
LARGE_RESPONSE = 192  # probabilities of a response; more are serialised outside of the event loop
Result = TypeVar("Result")


class Offloader:
    """One thread for long work. Many large bodies wait for each other, and the event loop waits for none of them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "offload")

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run_if(self, long: bool, work: Callable[[], Result]) -> Result:
        """Run `work` in the thread if it is long, otherwise in the event loop."""
        return await self.run(work) if long else work()
