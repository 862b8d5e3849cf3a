"""Load, verify, swap and drain a model. Independent of HTTP; one object per worker.

Workers share a new model through one file in their shared folder: a verified copy of the artefact, placed there by
renaming. A restarted worker opens that copy, not the file at the configured path.
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

from service.errors import ArtefactRejected, Draining, NotReady, SchemaRejected, ServiceError, StoreNotConfigured
from service.inference.model_loader import open_model
from service.inference.onnx_model import Model
from service.inference.predictor import Predictor
from service.metrics import Metrics
from service.server import malloc
from service.settings import Settings
from service.store.label_accounting import LabelAccounting
from service.store.store import Store

GC_THRESHOLDS = (20_000, 20, 20)  # objects of a few hundred requests; Python's default of 700 is reached by a few
COPY_POLL_SECONDS = 0.25  # between checks for a new model of another worker
STORE_POLL_SECONDS = 1.0  # between checks of the store for another temperature
PRUNE_SECONDS = 600.0  # between deletions of expired rows
MALLOC_TRIM_SECONDS = 60.0
log = logging.getLogger("engine_health")


class Lifecycle:
    """The active predictor and its changes.

    Attributes:
        predictor: the active one; None until a model is verified. Hot paths read it, others call `ready_predictor`.
        store: stored data; None if the service is stateless.
        labels: the counters of labels.
        verified: set once a model is verified.
        peers_serving: whether other workers were serving when this one started.
    """

    def __init__(self, settings: Settings, metrics: Metrics, shared: Path | None = None) -> None:
        self.settings, self.metrics = settings, metrics
        self.predictor: Predictor | None = None
        self.draining = False
        self.labels = LabelAccounting(metrics)
        self.store = Store(settings, metrics, self.labels) if settings.database_url else None
        self._copy = shared / "model.onnx" if shared else None
        self._served_file = shared / "served" if shared else None  # it exists once any worker has served
        self.verified = asyncio.Event()
        self.peers_serving = self._served_file is not None and self._served_file.exists()
        self._copy_version: tuple[int, int] | None = None  # inode and time of modification
        self._change_lock = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        metrics.ready.set(0)
        metrics.store_up.set(0 if settings.database_url else math.nan)  # NaN: not down, but not configured

    def ready_predictor(self) -> Predictor:
        """Return the active predictor.

        Raises:
            NotReady: no model is verified yet.
        """
        if self.predictor is None:
            raise NotReady("no model is verified yet")
        return self.predictor

    def accepting_predictor(self) -> Predictor:
        """Return the active predictor while the service accepts new work.

        Raises:
            NotReady: no model is verified yet.
            Draining: the process is shutting down.
        """
        if self.draining:
            raise Draining("draining: this process is shutting down")
        return self.ready_predictor()

    def require_store(self) -> Store:
        """Return the store.

        Raises:
            StoreNotConfigured: no database is configured.
        """
        if self.store is None:
            raise StoreNotConfigured("no store is configured: set ENGINE_HEALTH_DATABASE_URL and restart")
        return self.store

    async def open(self, on_rejected: Callable[[str], None]) -> None:
        """Load the first model, then run the background tasks; call `on_rejected` with the reason if it is rejected."""
        try:
            await self._open_store()
            await self._load(self._copy if self._copy and self._copy.exists() else self.settings.model)
        except (ArtefactRejected, SchemaRejected) as error:
            on_rejected(error.detail)
            return
        except Exception as error:  # otherwise it would stay unready without a log line
            log.exception("the model could not be opened")
            on_rejected(f"{type(error).__name__}: {error}")
            return
        tasks = [_trim_malloc()]
        tasks += [self._follow_workers(self._copy)] if self._copy else []
        tasks += [self._follow_store(self.store)] if self.store else []
        await asyncio.gather(*tasks)

    async def reload(self) -> str:
        """Load the configured path again while the active model serves, verify it, swap. Return the digest.

        Raises:
            ArtefactRejected: the file is not verified; the active model continues to serve.
        """
        if self._copy is None:
            return await self._load(self.settings.model)
        return await self._load_for_all(self.settings.model, self._copy)

    async def reload_quietly(self) -> None:
        """Reload and log a failure."""
        try:
            await self.reload()
        except ArtefactRejected as error:
            log.error("reload rejected, the active model is unchanged: %s", error.detail)

    def drain(self) -> None:
        """Become unready, and continue to serve."""
        self.draining = True
        self.metrics.ready.set(0)

    async def close(self) -> None:
        """Complete all admitted requests, then close."""
        self.drain()
        if self.predictor is not None:
            await self.predictor.close()
        await asyncio.gather(*self._closing)
        if self.store is not None:
            await self.store.close()

    async def refresh_temperature(self) -> None:
        """Apply the active temperature that the store has for this model."""
        async with self._change_lock:
            predictor = self.predictor
            if predictor is None:
                return
            temperature = await self._active_temperature(predictor.model)
            if temperature != (predictor.temperature, predictor.temperature_source):
                self._swap(Predictor(predictor.model, self.metrics, self.settings, temperature))
                log.info("temperature %g, from %s", *temperature)

    async def _open_store(self) -> None:
        if self.store is None:
            return
        try:
            await self.store.open()
        except SchemaRejected:
            raise
        except ServiceError as error:  # predictions do not need it, and it is opened again later
            log.error("the store is unavailable, predictions are not stored: %s", error.detail)

    async def _follow_store(self, store: Store) -> None:
        """Poll for another temperature, reconnect a database that was unavailable, and delete expired rows."""
        was_up, next_prune = True, 0.0
        while True:
            try:
                await store.open()
                await self.refresh_temperature()
                if time.monotonic() > next_prune:
                    await store.prune()
                    next_prune = time.monotonic() + PRUNE_SECONDS
                up = True
            except ServiceError as error:
                up = False
                if was_up:
                    log.error("the store is unavailable, predictions are not stored: %s", error.detail)
            except Exception:  # the next poll tries again
                up = False
                log.exception("maintenance of the store failed")
            if up and not was_up:
                log.info("the database responds again")
            was_up = up
            self.metrics.store_up.set(up)
            await asyncio.sleep(STORE_POLL_SECONDS)

    async def _follow_workers(self, copy: Path) -> None:
        while True:
            await asyncio.sleep(COPY_POLL_SECONDS)
            await self._load_new_copy(copy)

    async def _active_temperature(self, model: Model) -> tuple[float, str]:
        """Return the active temperature of a model and its source."""
        artefact = (model.manifest.temperature, "artefact")
        if self.store is None:
            return artefact
        try:
            return await self.store.temperature(model) or artefact
        except ServiceError:  # the next poll tries again; until then the temperature stays
            active = self.predictor
            if active is not None and active.model.digest == model.digest:
                return active.temperature, active.temperature_source
            return artefact

    async def _load(self, path: Path) -> str:
        async with self._change_lock:
            if self.predictor is None:
                gc.freeze()  # objects of imported libraries stay: no collection examines them
                gc.set_threshold(*GC_THRESHOLDS)
                gc.enable()
            settings = self.settings
            limits = (settings.threads, settings.max_batch_rows, settings.deterministic)
            model = await asyncio.to_thread(open_model, path, settings.model_digest, *limits)
            active = self.predictor
            if active is not None and active.model.digest == model.digest:
                return model.digest
            self._swap(Predictor(model, self.metrics, settings, await self._active_temperature(model)))
            self.verified.set()
            if self._served_file is not None:
                self._served_file.touch()
            log.info("ready: %s %s, %s", model.manifest.name, model.manifest.version, model.digest)
            return model.digest

    def _swap(self, replacement: Predictor) -> None:
        """Activate another predictor; requests that hold the previous one complete with it."""
        previous, self.predictor = self.predictor, replacement
        replacement.serve()
        if self.draining:
            self.metrics.ready.set(0)
        if previous is not None:
            task = asyncio.create_task(_retire(previous))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _load_for_all(self, path: Path, copy: Path) -> str:
        """Verify a copy of the file, and put it where the other workers find it."""
        candidate = copy.with_suffix(f".{uuid.uuid4().hex}")
        try:
            await asyncio.to_thread(shutil.copyfile, path, candidate)
            digest = await self._load(candidate)
            os.replace(candidate, copy)
        except OSError as error:
            raise ArtefactRejected(f"{path}: {error.strerror}") from None
        except ArtefactRejected as error:
            raise ArtefactRejected(error.detail.replace(str(candidate), str(path))) from None
        finally:
            candidate.unlink(missing_ok=True)
        return digest

    async def _load_new_copy(self, copy: Path) -> None:
        """Load the copy of another worker if it has changed."""
        try:
            status = copy.stat()
        except FileNotFoundError:
            return
        version = (status.st_ino, status.st_mtime_ns)
        if version == self._copy_version:
            return
        self._copy_version = version
        try:
            await self._load(copy)
        except ArtefactRejected as error:
            log.error("the model that another worker loaded was rejected: %s", error.detail)


async def _trim_malloc() -> None:
    """Return the memory of fits and large bodies to the system regularly; fragments would hold it otherwise."""
    while True:
        await asyncio.sleep(MALLOC_TRIM_SECONDS)
        with suppress(RuntimeError):  # no thread can be started: the next minute tries again
            await asyncio.to_thread(malloc.trim)


async def _retire(predictor: Predictor) -> None:
    """Close a predictor once its requests are complete, and free its memory."""
    await predictor.close()
    del predictor
    gc.collect()  # it has reference cycles, and the next full collection may be hours away
