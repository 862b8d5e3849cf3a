"""Score the units of a job on a Ray cluster: Ray Data streams them through a pool of actors.

One task reads the input and assembles units, because the rows of an engine depend on each other. Each actor opens the
model once and scores one unit at a time. The driver receives the units in order and writes the output, whose bytes are
those of a local job. The unit of a killed actor is scored again.
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
from service.inference.onnx_model import Model
from service.inference.overlap_graph import open_overlap_graph
from service.inference.predictions import Predictions
from service.scoring.engine_states import EngineStates
from service.scoring.options import Options
from service.scoring.rows import Layout
from service.scoring.scorer import BATCH_WINDOWS, Scorer
from service.scoring.sources import Source
from service.scoring.window_assembly import WorkUnit, assemble_units

READER_CORES = 0  # the actors may use all cores; with equal numbers Ray would fuse both into one task
LOCAL_CLUSTER = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
ADDRESS_KEYWORDS = ("auto", "local")  # addresses that Ray resolves itself
CONNECT_SECONDS = 10.0
BLOCK_BYTES = 2**16  # target size of a block, so small that every unit is one block


class ScoringActor:
    """Ray actor with a model, opened once from its bytes, at one temperature."""

    def __init__(self, content: bytes, deterministic: bool, temperature: float) -> None:
        with _temporary_file(content) as path:
            model = open_verified_model(path, deterministic)
            self.scorer = Scorer(model, temperature, open_overlap_graph(path, model))

    def __call__(self, rows: Any) -> Any:
        """Return a table of pickled units with their predictions."""
        import pyarrow as pa

        answered = [pickle.dumps(self.answer_unit(*pickle.loads(unit.as_py()))) for unit in rows["unit"]]
        return pa.table({"unit": pa.array(answered, pa.large_binary())})

    def answer_unit(self, unit: WorkUnit, needed: bool) -> tuple[WorkUnit, Predictions | None]:
        """Return a unit and its predictions; None if an earlier run scored it."""
        if not needed:
            return unit, None
        return unit, self.scorer.join_answers(unit, [call() for call in self.scorer.inference_calls(unit)])


def stream_answers(
    options: Options, sources: list[Source], path: Path, deterministic: bool, temperature: float, finished_units: int
) -> Generator[tuple[WorkUnit, Predictions | None]]:
    """Yield every unit in order, with its predictions; None for the first `finished_units` units.

    Raises:
        InvalidInput: the cluster is not reachable or too small, or a task failed after all its retries.
    """
    content = path.read_bytes()
    with _ray_session(options) as ray:
        datasource = _build_datasource(options, sources, content, deterministic, finished_units)
        units = ray.data.read_datasource(datasource, override_num_blocks=1, num_cpus=READER_CORES)
        answered = units.map_batches(
            ScoringActor,
            fn_constructor_args=(content, deterministic, temperature),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=_actor_count(options, ray)),
        )
        for batch in answered.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield pickle.loads(batch["unit"][0].as_py())


@contextmanager
def _ray_session(options: Options) -> Iterator[Any]:
    """Yield Ray, connected to the cluster of the options or to a new local one. Raise its errors in one line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics; Ray reads it on import
    import ray
    import ray.data

    try:
        _connect_to_ray(options, ray)
        yield ray
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        detail = cause.detail if isinstance(cause, ServiceError) else str(error).strip().splitlines()[-1]
        raise InvalidInput(detail) from None
    finally:
        ray.shutdown()


def _connect_to_ray(options: Options, ray: Any) -> None:
    """Connect to the cluster of the address, or start a cluster that listens only on this machine."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    cluster = {"address": address} if address else LOCAL_CLUSTER
    try:
        if address and address not in ADDRESS_KEYWORDS:
            _check_reachable(address)
        ray.init(**cluster, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises plain Exception if a cluster does not start in time
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"Ray, {cluster['address']}: {reason}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES


def _check_reachable(address: str) -> None:
    """Raise OSError within seconds if nothing listens at the address. Ray itself retries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError("expected HOST:PORT or ray://HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _actor_count(options: Options, ray: Any) -> int:
    cores = int(ray.cluster_resources().get("CPU", 1))
    workers = options.workers or max(cores - 1, 1)
    if workers > cores:
        raise InvalidInput(f"--workers {workers}: the cluster has {cores} cores; use at most as many workers")
    return workers


@contextmanager
def _temporary_file(content: bytes) -> Iterator[Path]:
    """Yield the path of a temporary file with this content."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def open_verified_model(path: Path, deterministic: bool) -> Model:
    """Open and verify a model with the settings of batch scoring."""
    return model_loader.open_model(path, "", 1, BATCH_WINDOWS, deterministic)


def _build_datasource(
    options: Options, sources: list[Source], content: bytes, deterministic: bool, finished_units: int
) -> Any:
    """Return a datasource of one task, which yields one block per unit with a flag: whether to score it."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def read() -> Iterator[Any]:
        import pyarrow as pa

        with _temporary_file(content) as path:
            model = open_verified_model(path, deterministic)
        with tempfile.TemporaryDirectory() as folder, closing(EngineStates.for_model(model, Path(folder))) as states:
            for number, unit in enumerate(assemble_units(options, Layout(options, model), sources, states)):
                yield pa.table({"unit": pa.array([pickle.dumps((unit, number >= finished_units))], pa.large_binary())})

    class UnitSource(Datasource):  # type: ignore[misc]  # ray may be absent where types are checked
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))]

    return UnitSource()
