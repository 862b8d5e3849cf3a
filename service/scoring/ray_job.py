"""The same job on a cluster: Ray Data streams units through a pool of actors. The answers are those of one machine.

One task reads and gathers, so that engines stay together; each actor opens the model once and scores a unit at a time;
the driver gets the units in their order and writes. A killed actor costs what it had in hand, which is done again.
"""

import logging
import os
import pickle
import socket
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from service.errors import InvalidInput, ServiceError
from service.inference import model_loader
from service.inference.model_loader import Model
from service.inference.overlap_graph import open_histories
from service.inference.predictions import Answers
from service.scoring.engine_states import States
from service.scoring.options import Options
from service.scoring.rows import Layout
from service.scoring.scorer import BATCH, Scorer
from service.scoring.sources import Source
from service.scoring.window_assembly import Unit, units

READER_CORES = 0  # beside the actors, which may have all; with as many as theirs Ray would make one task of both
OWN = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
KEYWORDS = ("auto", "local")  # addresses that Ray finds by itself
REACH_SECONDS = 10.0
UNIT_BYTES = 2**16  # after which Ray passes a block on: every unit is one


class Worker:
    """An actor: the model, opened once from its bytes, at one temperature."""

    def __init__(self, content: bytes, deterministic: bool, temperature: float) -> None:
        with _file(content) as path:
            model = opened(path, deterministic)
            self.scorer = Scorer(model, temperature, open_histories(path, model))

    def __call__(self, rows: Any) -> Any:
        """A table of units to the same with their answers."""
        import pyarrow as pa

        done = [pickle.dumps(self.answered(*pickle.loads(unit.as_py()))) for unit in rows["unit"]]
        return pa.table({"unit": pa.array(done, pa.large_binary())})

    def answered(self, unit: Unit, wanted: bool) -> tuple[Unit, Answers | None]:
        """A unit and its answers; None if they are known."""
        if not wanted:
            return unit, None
        return unit, self.scorer.together(unit, [call() for call in self.scorer.batches(unit)])


def answered(
    options: Options, sources: list[Source], path: Path, deterministic: bool, temperature: float, done: int
) -> Generator[tuple[Unit, Answers | None]]:
    """Every unit in order, with its answers; None for the first `done` units.

    Raises:
        InvalidInput: there is no such cluster, it is too small, or a task failed on it more often than it is retried.
    """
    content = path.read_bytes()
    with _connected(options) as ray:
        reading = _datasource(options, sources, content, deterministic, done)
        found = ray.data.read_datasource(reading, override_num_blocks=1, num_cpus=READER_CORES)
        scored = found.map_batches(
            Worker,
            fn_constructor_args=(content, deterministic, temperature),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=_actors(options, ray)),
        )
        for batch in scored.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield pickle.loads(batch["unit"][0].as_py())


@contextmanager
def _connected(options: Options) -> Iterator[Any]:
    """Ray, connected to the cluster that is meant, or to one of this job's own; its failures in one line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read as Ray is imported: it tells nobody of this job
    import ray
    import ray.data

    try:
        _connect(options, ray)
        yield ray
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        detail = cause.detail if isinstance(cause, ServiceError) else str(error).strip().splitlines()[-1]
        raise InvalidInput(detail) from None
    finally:
        ray.shutdown()


def _connect(options: Options, ray: Any) -> None:
    """To the cluster of the address; without one to a cluster begun here, that listens on this machine only."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    where = {"address": address} if address else OWN
    try:
        if address and address not in KEYWORDS:
            _reach(address)
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises bare ones too, where a cluster does not come up in time
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"Ray, {where['address']}: {reason}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = UNIT_BYTES


def _reach(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError("expected HOST:PORT or ray://HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


def _actors(options: Options, ray: Any) -> int:
    cores = int(ray.cluster_resources().get("CPU", 1))
    workers = options.workers or max(cores - 1, 1)
    if workers > cores:
        raise InvalidInput(f"--workers {workers}: the cluster has {cores} cores")
    return workers


@contextmanager
def _file(content: bytes) -> Iterator[Path]:
    """A file of some bytes, for a while."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def opened(path: Path, deterministic: bool) -> Model:
    """The model of a file, proven, as every actor has it."""
    return model_loader.open_model(path, "", 1, BATCH, deterministic)


def _datasource(options: Options, sources: list[Source], content: bytes, deterministic: bool, done: int) -> Any:
    """One task that reads everything and gives a block for each unit, whether it is to be scored within."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def read() -> Iterator[Any]:
        import pyarrow as pa

        with _file(content) as path:
            model = opened(path, deterministic)
        with tempfile.TemporaryDirectory() as folder, closing(States.of(model, Path(folder))) as states:
            for number, unit in enumerate(units(options, Layout(options, model), sources, states)):
                yield pa.table({"unit": pa.array([pickle.dumps((unit, number >= done))], pa.large_binary())})

    class Units(Datasource):  # type: ignore[misc]  # ray may be absent where types are checked
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))]

    return Units()
