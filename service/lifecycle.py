"""Which model answers: opened, proven, warmed, swapped, drained. Knows no HTTP; one object for each worker.

Workers tell each other of a new model through one file in a folder that they share: a proven copy of the artefact, put
there by renaming. A worker that is started again opens that copy, whatever lies at the configured path by then.
"""

import asyncio
import gc
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service.errors import ArtefactRejected, Draining, NoMemory, NotReady, SchemaRejected, ServiceError
from service.inference.model_loader import Model, open_model
from service.inference.predictor import Predictor
from service.metrics import Metrics
from service.server import malloc
from service.settings import Settings
from service.store.label_accounting import LabelAccounting
from service.store.store import Memory

GARBAGE = (20_000, 20, 20)  # objects of a few hundred requests; Python's own 700 are a few per request
LOOK_SECONDS = 0.25  # how often a worker looks whether another one has a new model
ASK_SECONDS = 1.0  # how often a worker asks the database whether the temperature is another one
PRUNE_SECONDS = 600.0  # how often what is too old is forgotten
TIDY_SECONDS = 60.0  # how often the heap gives its holes back
log = logging.getLogger("engine_health")


class Lifecycle:
    """The active predictor and its changes; `predictor` is None until a model has proved itself."""

    def __init__(self, settings: Settings, metrics: Metrics, shared: Path | None = None) -> None:
        self.settings, self.metrics = settings, metrics
        self.predictor: Predictor | None = None
        self.draining = False
        self.labels = LabelAccounting(metrics)
        self._memory = Memory(settings, metrics, self.labels) if settings.database_url else None
        self._copy = shared / "model.onnx" if shared else None
        self._served = shared / "served" if shared else None  # there once any worker has answered
        self.proven = asyncio.Event()
        self.relieved = self._served is not None and self._served.exists()  # others answer until this one can
        self._seen: tuple[int, int] | None = None
        self._change = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        metrics.ready.set(0)
        metrics.memory_up.set(0 if settings.database_url else math.nan)  # a database that nobody wants is not down

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
            NotReady: no model yet.
            Draining: the process is shutting down.
        """
        if self.draining:
            raise Draining("draining: this process is about to close")
        return self.ready_predictor()

    def memory(self) -> Memory:
        """What is remembered.

        Raises:
            NoMemory: no database is configured.
        """
        if self._memory is None:
            raise NoMemory("this service is stateless: set ENGINE_HEALTH_DATABASE_URL to remember anything")
        return self._memory

    @property
    def remembers(self) -> bool:
        """Whether there is a memory."""
        return self._memory is not None

    async def open(self, on_rejected: Callable[[str], None]) -> None:
        """Open the first model, then follow the other workers; `on_rejected` is told why if it proves nothing."""
        try:
            await self._open_memory()
            copied = self._copy is not None and self._copy.exists()
            await self._load(self._copy if copied and self._copy else self.settings.model)
        except (ArtefactRejected, SchemaRejected) as error:
            on_rejected(error.detail)
            return
        except Exception as error:  # never unready for ever without a word
            log.exception("the model could not be opened")
            on_rejected(f"{type(error).__name__}: {error}")
            return
        watching = [_keep_tidy()]
        watching += [self._follow_workers(self._copy)] if self._copy else []
        watching += [self._follow_memory(self._memory)] if self._memory else []
        await asyncio.gather(*watching)

    async def reload(self) -> str:
        """Open the configured path again beside the model that answers, prove it, swap. Returns the digest.

        Raises:
            ArtefactRejected: the file does not prove itself; the model that answers goes on.
        """
        if self._copy is None:
            return await self._load(self.settings.model)
        return await self._load_for_all(self.settings.model, self._copy)

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
        if self._memory is not None:
            await self._memory.close()

    async def temper(self) -> None:
        """Take the temperature that the database has for the model that answers, if it is another one."""
        async with self._change:
            before = self.predictor
            if before is None:
                return
            tempered = await self._tempered(before.model)
            if tempered != (before.temperature, before.temperature_source):
                self._swap(Predictor(before.model, self.metrics, self.settings, tempered))
                log.info("temperature %g, from %s", *tempered)

    async def _open_memory(self) -> None:
        if self._memory is None:
            return
        try:
            await self._memory.open()
        except SchemaRejected:
            raise
        except ServiceError as error:  # predictions are answered without it, and it is asked again
            log.error("nothing is remembered: %s", error.detail)

    async def _follow_memory(self, memory: Memory) -> None:
        """Ask again and again: for another temperature, for a database that was away, for what is too old."""
        was_up, next_prune = True, 0.0
        while True:
            try:
                await memory.open()
                await self.temper()
                if time.monotonic() > next_prune:
                    await memory.prune()
                    next_prune = time.monotonic() + PRUNE_SECONDS
                up = True
            except ServiceError as error:
                up = False
                if was_up:
                    log.error("nothing is remembered: %s", error.detail)
            except Exception:  # whatever it is, the next second is another try
                up = False
                log.exception("the memory could not be looked after")
            if up and not was_up:
                log.info("the database answers again")
            was_up = up
            self.metrics.memory_up.set(up)
            await asyncio.sleep(ASK_SECONDS)

    async def _follow_workers(self, copy: Path) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._follow(copy)

    async def _tempered(self, model: Model) -> tuple[float, str]:
        own = (model.manifest.temperature, "artefact")
        if self._memory is None:
            return own
        try:
            return await self._memory.temperature(model) or own
        except ServiceError:  # it is asked again; until then what was in force goes on
            before = self.predictor
            same = before is not None and before.model.digest == model.digest
            return (before.temperature, before.temperature_source) if before is not None and same else own

    async def _load(self, path: Path) -> str:
        async with self._change:
            if self.predictor is None:
                gc.freeze()  # what the libraries are made of stays: no collection needs to look at it, not even a first
                gc.set_threshold(*GARBAGE)
                gc.enable()
            s = self.settings
            arguments = (path, s.model_digest, s.threads, s.max_batch_rows, s.deterministic)
            model = await asyncio.to_thread(open_model, *arguments)
            before = self.predictor
            if before is not None and before.model.digest == model.digest:
                return model.digest
            self._swap(Predictor(model, self.metrics, s, await self._tempered(model)))
            self.proven.set()
            if self._served is not None:
                self._served.touch()
            log.info("ready: %s %s, %s", model.manifest.name, model.manifest.version, model.digest)
            return model.digest

    def _swap(self, after: Predictor) -> None:
        """Let another predictor answer from now on; those who hold the one before are answered by it."""
        before, self.predictor = self.predictor, after
        after.serve()
        if self.draining:
            self.metrics.ready.set(0)
        if before is not None:
            task = asyncio.create_task(_retire(before))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _load_for_all(self, path: Path, copy: Path) -> str:
        """Prove a copy of the file, and put that same copy where the other workers look."""
        own = copy.with_suffix(f".{uuid.uuid4().hex}")
        try:
            await asyncio.to_thread(shutil.copyfile, path, own)
            digest = await self._load(own)
            os.replace(own, copy)
        except OSError as error:
            raise ArtefactRejected(f"{path}: {error.strerror}") from None
        except ArtefactRejected as error:
            raise ArtefactRejected(error.detail.replace(str(own), str(path))) from None
        finally:
            own.unlink(missing_ok=True)
        return digest

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


async def _keep_tidy() -> None:
    """Fits and large bodies take for a moment what would else be held for ever, in pieces between what is needed."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        with suppress(RuntimeError):  # no thread is to be had: the next minute is another try, and others go on
            await asyncio.to_thread(malloc.tidy)


async def _retire(predictor: Predictor) -> None:
    """Let go of a model: those who hold it are answered by it, then its memory is given back."""
    await predictor.close()
    del predictor
    gc.collect()  # it refers to itself, and the next collection of all may be hours away
