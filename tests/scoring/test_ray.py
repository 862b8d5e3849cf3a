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
ray = pytest.importorskip("ray", reason="ray is not installed: pip install engine-health[ray]")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight thousand flights of eighty engines, one of them wrong."""
    random, n, length = np.random.default_rng(0), 80, 100
    columns: dict[str, Any] = {"engine_id": [f"e{i % n}" for i in range(n * length)]}
    columns["cycle"] = [i // n for i in range(n * length)]
    columns |= {name: random.normal(500, 5, n * length) for name in CHANNELS}
    columns["sensor_2"][777] = np.nan
    return write(pa.table(columns), tmp_path_factory.mktemp("fleet") / "fleet.parquet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two workers, on this machine."""
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).parents[2])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": root}  # its processes import this code
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            found.add_node(num_cpus=1)
        found.wait_for_nodes()
        yield found.address
    finally:
        found.shutdown()


def score(*arguments: object) -> tuple[int, str]:
    """A job in a process of its own."""
    process = start("score", *map(str, arguments), *FLAGS)
    said, errors = process.communicate(timeout=300)
    return process.returncode, said + errors


@pytest.fixture(scope="module")
def local(fleet: Path) -> Path:
    """What one machine makes of the fleet."""
    assert (3, "") == score(fleet, fleet.with_name("local.parquet"))
    return fleet.with_name("local.parquet")


def test_a_cluster_gives_the_bytes_of_one_machine(fleet: Path, local: Path, cluster: str, tmp_path: Path) -> None:
    """On a local cluster of two workers output and rejected rows are those of one machine, byte for byte."""
    code, said = score(fleet, tmp_path / "ray.parquet", "--backend", "ray", "--address", cluster, "--workers", "2")
    assert 3 == code, said  # Ray's own processes may say something
    for suffix in ("", ".errors.parquet"):
        assert Path(f"{local}{suffix}").read_bytes() == (tmp_path / f"ray.parquet{suffix}").read_bytes()


def test_an_address_without_a_cluster_is_one_line(fleet: Path, tmp_path: Path) -> None:
    """Where no cluster answers the job fails with exit code 1, and leaves nothing."""
    code, said = score(fleet, tmp_path / "ray.parquet", "--backend", "ray", "--address", "127.0.0.1:9")
    assert 1 == code
    assert said.splitlines()[-1].startswith("engine-health: Ray, 127.0.0.1:9: ")
    assert "Traceback" not in said
    assert [] == list(tmp_path.iterdir())


def workers() -> list[int]:
    """The actors that score, by their process ids."""
    asked = ["pgrep", "-f", "ray::MapBatches|ray::MapWorker"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_killed_actor_costs_a_retry_and_nothing_else(fleet: Path, local: Path, cluster: str, tmp_path: Path) -> None:
    """One of two actors killed with SIGKILL at work: the job ends as if nothing had happened, with the same bytes."""
    output = tmp_path / "ray.parquet"
    process = start(
        "score", str(fleet), str(output), "--backend", "ray", "--address", cluster, "--workers", "2", *FLAGS
    )
    journal = tmp_path / "ray.parquet.partial" / "journal"
    while not journal.exists() or not workers():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(workers()[0], signal.SIGKILL)
    said, errors = process.communicate(timeout=300)
    assert 3 == process.returncode, said + errors
    assert local.read_bytes() == output.read_bytes()
