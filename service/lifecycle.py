"""Which model answers: opened, proven, warmed, swapped, drained. Knows no HTTP; one object for each worker.

Workers tell each other of a new model through one file in a folder that they share: a proven copy of the artefact, put
there by renaming. A worker that is started again opens that copy, whatever lies at the configured path by then.
"""

import asyncio
import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path

from service.errors import ArtefactRejected, NotReady
from service.metrics import Metrics
from service.predictor import Predictor
from service.runtime import open_model
from service.settings import Settings

GARBAGE = (20_000, 20, 20)  # objects of a few hundred requests; Python's own 700 are a few per request
LOOK_SECONDS = 0.25  # how often a worker looks whether another one has a new model
log = logging.getLogger("engine_health")


class Lifecycle:
    """The active predictor and its changes; `predictor` is None until a model has proved itself."""

    def __init__(self, settings: Settings, metrics: Metrics, shared: Path | None = None) -> None:
        self.settings, self.metrics = settings, metrics
        self.predictor: Predictor | None = None
        self.draining = False
        self._copy = shared / "model.onnx" if shared else None
        self._served = shared / "served" if shared else None  # there once any worker has answered
        self.proven = asyncio.Event()
        self.relieved = self._served is not None and self._served.exists()  # others answer until this one can
        self._seen: tuple[int, int] | None = None
        self._change = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        metrics.ready.set(0)

    def ready_predictor(self) -> Predictor:
        """The predictor.

        Raises:
            NotReady: no model yet.
        """
        if self.predictor is None:
            raise NotReady("no model has proved itself yet")
        return self.predictor

    def accepting(self) -> Predictor:
        """The predictor, while new callers are welcome.

        Raises:
            NotReady: no model yet, or about to close.
        """
        if self.draining:
            raise NotReady("draining: this process is about to close")
        return self.ready_predictor()

    async def open(self, on_rejected: Callable[[str], None]) -> None:
        """Open the first model, then follow the other workers; `on_rejected` is told why if it proves nothing."""
        try:
            copied = self._copy is not None and self._copy.exists()
            await self._load(self._copy if copied and self._copy else self.settings.model)
        except ArtefactRejected as error:
            on_rejected(error.detail)
            return
        except Exception as error:  # never unready for ever without a word
            log.exception("the model could not be opened")
            on_rejected(f"{type(error).__name__}: {error}")
            return
        while self._copy is not None:
            await asyncio.sleep(LOOK_SECONDS)
            await self._follow(self._copy)

    async def reload(self) -> str:
        """Open the configured path again beside the model that answers, prove it, swap. Returns the digest.

        Raises:
            ArtefactRejected: the file does not prove itself; the model that answers goes on.
        """
        digest = await self._load(self.settings.model)
        if self._copy is not None:
            await asyncio.to_thread(self._publish, self._copy)
        return digest

    async def reload_quietly(self) -> None:
        """As `reload`, for who cannot be answered: a failure is logged."""
        try:
            await self.reload()
        except ArtefactRejected as error:
            log.error("reload refused, the model that answers goes on: %s", error.detail)

    def drain(self) -> None:
        """Be unready, and go on answering."""
        self.draining = True
        self.metrics.ready.set(0)

    async def close(self) -> None:
        """Answer everybody who was let in."""
        self.drain()
        if self.predictor is not None:
            await self.predictor.close()
        await asyncio.gather(*self._closing)

    async def _load(self, path: Path) -> str:
        async with self._change:
            if self.predictor is None:
                gc.collect()
                gc.freeze()  # what the libraries are made of stays: no collection needs to look at it again
                gc.set_threshold(*GARBAGE)
            s = self.settings
            arguments = (path, s.model_digest, s.threads, s.max_batch_rows, s.deterministic)
            model = await asyncio.to_thread(open_model, *arguments)
            before = self.predictor
            if before is not None and before.model.digest == model.digest:
                return model.digest
            after = Predictor(model, self.metrics, s)
            after.serve()
            self.predictor = after
            if self.draining:
                self.metrics.ready.set(0)
            self.proven.set()
            if self._served is not None:
                self._served.touch()
            log.info("ready: %s %s, %s", model.manifest.name, model.manifest.version, model.digest)
            if before is not None:
                task = asyncio.create_task(_retire(before))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            return model.digest

    def _publish(self, copy: Path) -> None:
        """Put a copy of what was just proven where the other workers look, whole or not at all."""
        own = copy.with_suffix(f".{os.getpid()}")
        own.write_bytes(self.settings.model.read_bytes())
        os.replace(own, copy)

    async def _follow(self, copy: Path) -> None:
        try:
            found = copy.stat()
        except FileNotFoundError:
            return
        mark = (found.st_ino, found.st_mtime_ns)
        if mark == self._seen:
            return
        self._seen = mark
        try:
            await self._load(copy)
        except ArtefactRejected as error:
            log.error("another worker's model was refused: %s", error.detail)


async def _retire(predictor: Predictor) -> None:
    """Let go of a model: those who hold it are answered by it, then its memory is given back."""
    await predictor.close()
    del predictor
    gc.collect()  # it refers to itself, and the next collection of all may be hours away
