import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.contract import CHANNELS
from tests.support.processes import start
from tests.support.scoring import write

FLAGS = ("--quiet", "--part-rows", "800")
ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e .[ray]")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 8,000 flights of 80 engines. In one flight a reading is missing."""
    random, n, length = np.random.default_rng(0), 80, 100
    columns: dict[str, Any] = {"engine_id": [f"e{i % n}" for i in range(n * length)]}
    columns["cycle"] = [i // n for i in range(n * length)]
    columns |= {name: random.normal(500, 5, n * length) for name in CHANNELS}
    columns["sensor_2"][777] = np.nan
    return write(pa.table(columns), tmp_path_factory.mktemp("fleet") / "fleet.parquet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a cluster of two workers on this machine. Yield its address."""
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).parents[2])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": root}  # its processes import this code
    result = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            result.add_node(num_cpus=1)
        result.wait_for_nodes()
        yield result.address
    finally:
        result.shutdown()


def run_score(*arguments: object) -> tuple[int, str]:
    """Run a job in a separate process. Return its exit code and output."""
    process = start("score", *map(str, arguments), *FLAGS)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors


@pytest.fixture(scope="module")
def local_output(fleet: Path) -> Path:
    """Score the fleet on this machine. Return the path of the output."""
    assert (3, "") == run_score(fleet, fleet.with_name("local.parquet"))
    return fleet.with_name("local.parquet")


def test_cluster_output_equals_local_output(fleet: Path, local_output: Path, cluster: str, tmp_path: Path) -> None:
    """A cluster of two workers writes the same bytes as one machine: output and rejected rows."""
    code, output = run_score(
        fleet, tmp_path / "ray.parquet", "--backend", "ray", "--address", cluster, "--workers", "2"
    )
    assert 3 == code, output  # Ray's processes may print something
    for suffix in ("", ".errors.parquet"):
        assert Path(f"{local_output}{suffix}").read_bytes() == (tmp_path / f"ray.parquet{suffix}").read_bytes()


def test_unreachable_cluster_is_one_error_line(fleet: Path, tmp_path: Path) -> None:
    """Without a cluster at the address, the job exits with 1 and leaves no file."""
    code, output = run_score(fleet, tmp_path / "ray.parquet", "--backend", "ray", "--address", "127.0.0.1:9")
    assert 1 == code
    assert output.splitlines()[-1].startswith("engine-health: Ray, 127.0.0.1:9: ")
    assert "Traceback" not in output
    assert [] == list(tmp_path.iterdir())


def actor_processes() -> list[int]:
    """Return the process ids of the scoring actors."""
    command = ["pgrep", "-f", "ray::MapBatches|ray::MapWorker"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(line) for line in result.stdout.split()]


def test_killed_actor_does_not_change_the_output(fleet: Path, local_output: Path, cluster: str, tmp_path: Path) -> None:
    """After SIGKILL of one of two actors, the job completes with the same bytes."""
    output = tmp_path / "ray.parquet"
    process = start(
        "score", str(fleet), str(output), "--backend", "ray", "--address", cluster, "--workers", "2", *FLAGS
    )
    journal = tmp_path / "ray.parquet.partial" / "journal"
    while not journal.exists() or not actor_processes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(actor_processes()[0], signal.SIGKILL)
    text, errors = process.communicate(timeout=300)
    assert 3 == process.returncode, text + errors
    assert local_output.read_bytes() == output.read_bytes()
