"""Batch scoring for the README: the command against ONNX Runtime alone, and against pandas with ONNX Runtime.

    python -m benchmarks.score [--rows 1000000 10000000]      # = make bench-score

A fleet of synthetic engines is scored from Parquet to Parquet, in one process and with the same threads. ONNX Runtime
alone runs prepared windows with the faster of two methods: one call on all threads, or parallel calls on one thread
each. The pandas script runs in a separate environment, build/venv, if it exists. The figures are written to
build/score.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.load import machine
from model.contract import CHANNELS
from model.windows import every_window
from service.inference import model_loader
from service.inference.cpu import available_cpus
from service.scoring.scorer import BATCH_WINDOWS
from service.settings import BUNDLED

BUILD = Path("build")
PIECE = 100_000  # rows of the fleet per written block
LONG, SHORT = 300, 100  # cycles of an engine
ALONE_ROWS = 16_384  # windows that ONNX Runtime alone runs repeatedly
ALONE_SECONDS = 15.0


class Run(NamedTuple):
    """A process: duration and processor time in seconds, and peak memory in MB."""

    seconds: float
    processor: float
    memory: float


class Alone(NamedTuple):
    """ONNX Runtime on prepared windows: rows/s, and processor seconds per row."""

    rate: float
    processor: float


def fleet(path: Path, rows: int) -> Path:
    """Write a file of `rows` rows: engines that wear, complete cycles in order, as float64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists():
        return path
    generator, usual = np.random.default_rng(0), _read_usual_row()
    writer: Any = None
    engine = written = 0
    while written < rows:
        columns: dict[str, list[Any]] = {name: [] for name in ("engine_id", "cycle", *CHANNELS)}
        size = 0
        while size < min(PIECE, rows - written):
            cycles = min(int(generator.integers(SHORT, LONG)), rows - written - size)
            wear = np.linspace(0, 1, cycles)[:, None] ** 2
            values = usual * (
                1 + 0.002 * wear * generator.normal(size=17) + 0.0005 * generator.normal(size=(cycles, 17))
            )
            columns["engine_id"].append(np.full(cycles, f"engine-{engine:06d}"))
            columns["cycle"].append(np.arange(1, cycles + 1))
            for k, name in enumerate(CHANNELS):
                columns[name].append(values[:, k])
            engine, size = engine + 1, size + cycles
        table = pa.table({name: np.concatenate(parts) for name, parts in columns.items()})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        written += size
    writer.close()
    return path


def _read_usual_row() -> np.ndarray[Any, np.dtype[np.float64]]:
    manifest = model_loader.open_model(BUNDLED).manifest
    return np.array(manifest.golden[0].telemetry[-1], dtype=np.float64)


def measured(command: list[str]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: the command failed.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"ENGINE_HEALTH_LOG_LEVEL": "warning"})
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6)


def ours(source: Path, *flags: str) -> Run:
    """Run the `score` command."""
    target = BUILD / "scored.parquet"
    command = [sys.executable, "-m", "service.cli", "score", str(source), str(target), "--quiet", "--restart", *flags]
    return measured(command)


def naive(source: Path) -> Run | None:
    """Run the pandas script, or return None if its environment does not exist."""
    python = BUILD / "venv" / "bin" / "python"
    if not python.exists():
        return None
    return measured(
        [str(python), "benchmarks/servers/pandas_score.py", str(BUNDLED), str(source), str(BUILD / "naive.parquet")]
    )


def alone(threads: int) -> Alone:
    """Measure rows/s of ONNX Runtime on prepared windows, the faster of two methods."""
    generator = np.random.default_rng(1)
    histories = [
        (_read_usual_row() * (1 + 0.0005 * generator.normal(size=(256, 17)))).astype(np.float32)
        for _ in range(ALONE_ROWS // 256)
    ]
    windows = np.concatenate([every_window(history, 100) for history in histories])
    batches = [windows[i : i + BATCH_WINDOWS] for i in range(0, len(windows), BATCH_WINDOWS)]
    wide, narrow = model_loader.open_model(BUNDLED, threads=threads), model_loader.open_model(BUNDLED, threads=1)
    with ThreadPoolExecutor(threads) as pool:
        ways = (lambda: [wide.run(batch) for batch in batches], lambda: list(pool.map(narrow.run, batches)))
        return max(_measure_rate(way) for way in ways)


def _measure_rate(way: Any) -> Alone:
    way()
    passes, begun, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < ALONE_SECONDS / 2:
        way()
        passes += 1
    rows = passes * ALONE_ROWS
    return Alone(rows / (time.perf_counter() - begun), (time.process_time() - used) / rows)


def table(figures_by_rows: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table of rows/s and processor time per row, of the command and of the references."""
    yield "| rows | here, rows/s | ONNX Runtime alone | ratio | of processor time | peak MB | pandas script | ratio |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for rows, figures in figures_by_rows.items():
        here, best, script = figures["ours"], figures["alone"], figures["naive"]
        cells = [f"{rows:,}", f"{rows / here.seconds:,.0f}", f"{best.rate:,.0f}"]
        cells += [f"**{rows / here.seconds / best.rate:.2f}**", f"{best.processor * rows / here.processor:.2f}"]
        cells += [f"{here.memory:.0f}"]
        cells += ["-", "-"] if script is None else _format_script_cells(rows, script, here)
        yield "| " + " | ".join(cells) + " |"


def _format_script_cells(rows: int, script: Run, here: Run) -> list[str]:
    return [f"{rows / script.seconds:,.0f}", f"**{script.seconds / here.seconds:.1f}**"]


def killed(source: Path, times: int) -> Iterator[str]:
    """Kill jobs at random times, start them again, and count identical outputs.

    Raises:
        RuntimeError: a restarted job failed.
    """
    moments, target = random.Random(0), BUILD / "killed.parquet"
    command = [sys.executable, "-m", "service.cli", "score", str(source), str(target), "--quiet", "--part-rows", "8192"]
    usual = measured([*command, "--restart"]).seconds
    expected, same, finished_parts = target.read_bytes(), 0, 0
    for _ in range(times):
        target.unlink()
        process = subprocess.Popen(command)
        time.sleep(moments.random() * usual)
        process.kill()
        process.wait()
        journal = target.with_name(target.name + ".partial") / "journal"
        finished_parts += journal.read_bytes().count(b"\n") if journal.exists() else 0
        measured(command)
        same += target.read_bytes() == expected
    yield (
        f"{times} jobs killed and restarted: {same} with identical output; {finished_parts} finished parts were reused"
    )


def on_ray(source: Path, workers: list[int]) -> Iterator[str]:
    """Compare jobs on a local Ray cluster, started for each job, with a local job, and check that outputs are equal.

    Raises:
        RuntimeError: a job failed.
    """
    target = BUILD / "scored.parquet"
    yield f"local job: {ours(source).seconds:.1f} s"
    expected = target.read_bytes()
    for number in workers:
        seconds = ours(source, "--backend", "ray", "--workers", str(number)).seconds
        yield f"{number} Ray workers: {seconds:.1f} s, identical output: {target.read_bytes() == expected}"


def main() -> None:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description="Compare batch scoring with ONNX Runtime alone and a pandas script.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; the fastest counts")
    parser.add_argument("--kills", type=int, default=0, help="instead: kill this number of jobs, restart and compare")
    parser.add_argument("--workers", type=int, nargs="+", help="instead: run on Ray with these numbers of actors")
    chosen, figures_by_rows = parser.parse_args(), dict[int, dict[str, Any]]()
    BUILD.mkdir(exist_ok=True)
    if chosen.kills:
        print("\n".join(killed(fleet(BUILD / "fleet-100000.parquet", 100_000), chosen.kills)))
        return
    if chosen.workers:
        print("\n".join(on_ray(fleet(BUILD / f"fleet-{chosen.rows[0]}.parquet", chosen.rows[0]), chosen.workers)))
        return
    for rows in chosen.rows:
        source = fleet(BUILD / f"fleet-{rows}.parquet", rows)
        small = rows <= 1_000_000  # the script loads the whole file into memory
        rounds = [
            (ours(source), alone(available_cpus()), naive(source) if small else None) for _ in range(chosen.rounds)
        ]
        scripts = [script for *_, script in rounds if script is not None]
        figures_by_rows[rows] = {
            "ours": min(run for run, *_ in rounds),
            "alone": max(reference for _, reference, _ in rounds),
            "naive": min(scripts, default=None),
        }
        print(f"{rows:,} rows: {figures_by_rows[rows]}", file=sys.stderr)
    print(f"{machine()}; {available_cpus()} threads\n")
    print("\n".join(table(figures_by_rows)))
    (BUILD / "score.json").write_text(json.dumps({"machine": machine(), "figures": figures_by_rows}, indent=1))


if __name__ == "__main__":
    main()
