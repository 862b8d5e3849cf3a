"""Train the shipped network and one network per fold, and write the checkpoint.

    python -m model.training.cross_fit --epochs 20 --seed 0        # = make train

Each fold network is trained like the shipped one, on the other folds. Its outputs on its own fold are the held-out
outputs, from which `calibrate` computes temperature, prediction sets and references. Each run uses one core.
"""

import argparse
import hashlib
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from model.data import cmapss
from model.data.cmapss import DataError, History
from model.training.network import EngineHealth, NetworkConfig, NetworkOutput
from model.training.train import TrainingConfig, build_network, build_windows, predict_windows, train_network

CHECKPOINT = Path("build/checkpoint.pt")


class TrainingRun(NamedTuple):
    """One training run: its training engines, and the held-out engines that it predicts afterwards."""

    name: str
    train: list[History]
    held_out: list[History]


def plan_runs(fleet: list[list[History]], config: TrainingConfig) -> list[TrainingRun]:
    """Return the run on all engines, then one run per fold that excludes this fold."""
    folds = assign_folds(fleet, config)
    runs = [TrainingRun("shipped", [history for subset in fleet for history in subset], [])]
    for k, held_out in enumerate(folds):
        rest = [history for j, fold in enumerate(folds) if j != k for history in fold]
        runs.append(TrainingRun(f"fold {k + 1} ", rest, held_out))
    return runs


def assign_folds(fleet: list[list[History]], config: TrainingConfig) -> list[list[History]]:
    """Assign engines to folds at random, each subset evenly."""
    if not config.folds:
        return []
    subset_folds = [cmapss.split_engines(subset, [1 / config.folds] * config.folds, config.seed) for subset in fleet]
    return [[history for subset_fold in subset_folds for history in subset_fold[k]] for k in range(config.folds)]


def execute_run(run: TrainingRun, config: TrainingConfig) -> tuple[EngineHealth, float, NetworkOutput | None]:
    """Train one network on one core, and predict its held-out engines."""
    torch.set_num_threads(1)
    network = build_network(run.train, config)
    loss = train_network(network, build_windows(run.train, network), config, run.name)
    return network, loss, predict_windows(network, build_windows(run.held_out, network)) if run.held_out else None


def train_checkpoint(fleet: list[list[History]], config: TrainingConfig) -> dict[str, Any]:
    """Train all runs in parallel, one per core, and return the checkpoint."""
    started, runs = time.monotonic(), plan_runs(fleet, config)
    workers = min(len(runs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(execute_run, runs, [config] * len(runs)))
    network, loss, _ = results[0]
    engines = runs[0].train
    outputs = [output for _, _, output in results if output is not None]
    return {
        "network": asdict(network.config),
        "weights": network.state_dict(),
        "knobs": asdict(config),
        "loss": loss,
        "held_out": _held_out_outputs(runs[1:], outputs, engines),
        "subsets": [subset[0].engine_id.partition("-")[0] for subset in fleet],
        "data": {"sha256": data_digest(engines), "engines": len(engines), "rows": sum(len(h.cycle) for h in engines)},
        "split": {run.name.strip(): [len(run.train), len(run.held_out)] for run in runs},
        "made_with": {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()},
        "seconds": round(time.monotonic() - started),
    }


def _split_by_engine(engines: list[History], rows: Tensor) -> list[Tensor]:
    return list(torch.split(rows, [len(history.cycle) for history in engines]))


def _held_out_outputs(
    runs: list[TrainingRun], outputs: list[NetworkOutput], engines: list[History]
) -> dict[str, Tensor]:
    """Return the outputs of fold networks on their held-out engines, in the order of engines and rows."""
    if not runs:
        return {}
    by_engine = {
        name: {
            history.engine_id: rows
            for run, output in zip(runs, outputs, strict=True)
            for history, rows in zip(run.held_out, _split_by_engine(run.held_out, getattr(output, name)), strict=True)
        }
        for name in ("logits", "rul", "bins")
        if getattr(outputs[0], name) is not None
    }
    lengths = torch.tensor([len(history.cycle) for history in engines])
    return {name: torch.cat([rows[h.engine_id] for h in engines]) for name, rows in by_engine.items()} | {
        "engine": torch.repeat_interleave(lengths),
        "true_rul": torch.from_numpy(np.concatenate([history.require_rul() for history in engines])),
        "weight": torch.from_numpy(np.concatenate([cmapss.cutoff_weights(history) for history in engines])),
    }


def data_digest(engines: list[History]) -> str:
    """Return the sha256 of ids and readings of engines, which identifies the data in a manifest."""
    sha = hashlib.sha256()
    for history in engines:
        sha.update(history.engine_id.encode() + history.telemetry.tobytes())
    return sha.hexdigest()


def load_checkpoint(path: Path) -> tuple[EngineHealth, dict[str, Any]]:
    """Return the network in evaluation mode, and the whole checkpoint. Pickled code is not loaded.

    Raises:
        DataError: the file is missing, or is not a checkpoint of this version.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
        network = EngineHealth(NetworkConfig(**checkpoint["network"]))
        network.load_state_dict(checkpoint["weights"])
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a checkpoint of this version: {str(error).splitlines()[0]}") from None
    return network.eval(), checkpoint


def config_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with one flag per field of `TrainingConfig`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = get_type_hints(TrainingConfig)
    for field in fields(TrainingConfig):
        choices = get_args(hints[field.name]) or None
        value_type = str if choices else hints[field.name]
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=value_type, choices=choices, default=field.default, help=" "
        )
    return parser


def main() -> None:
    """Read C-MAPSS, train and write the checkpoint."""
    parser = config_parser("Train on C-MAPSS and write a checkpoint.")
    parser.add_argument("--subsets", nargs="+", choices=cmapss.SUBSETS, default=cmapss.SUBSETS)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    flags = vars(parser.parse_args())
    subsets, output = flags.pop("subsets"), flags.pop("output")
    try:
        fleet = [cmapss.read_train(cmapss.data_folder(), subset) for subset in subsets]
        checkpoint = train_checkpoint(fleet, TrainingConfig(**flags))
    except DataError as error:
        raise SystemExit(f"train: {error} (set CMAPSS_DIR, or run `make data`)") from None
    except ValueError as error:
        raise SystemExit(f"train: {error}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, output)
    print(f"wrote {output}: loss {checkpoint['loss']:.4f}, {checkpoint['seconds']} s")


if __name__ == "__main__":
    main()
