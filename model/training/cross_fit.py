"""From data to checkpoint: the shipped network, and what fold networks say of engines that they never saw.

    python -m model.training.cross_fit --epochs 20 --seed 0        # = make train

Each fold network is trained like the shipped one on the other folds; its answers on its own fold are the held-out
answers that temperature, prediction sets and references are made of (`calibrate`), and by which recipes are
compared. Runs use a core each.
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
from model.training.network import Answer, EngineHealth, NetworkConfig
from model.training.train import Knobs, build, predict, train, windows_of

CHECKPOINT = Path("build/checkpoint.pt")


class Run(NamedTuple):
    """One training: on which engines, and for which it answers afterwards."""

    name: str
    train: list[History]
    held_out: list[History]


def plan(fleet: list[list[History]], knobs: Knobs) -> list[Run]:
    """The shipped run on all engines, then one for each fold without it."""
    folds = deal(fleet, knobs)
    runs = [Run("shipped", [history for subset in fleet for history in subset], [])]
    for k, held_out in enumerate(folds):
        rest = [history for j, fold in enumerate(folds) if j != k for history in fold]
        runs.append(Run(f"fold {k + 1} ", rest, held_out))
    return runs


def deal(fleet: list[list[History]], knobs: Knobs) -> list[list[History]]:
    """Engines dealt into folds at random, every subset evenly."""
    if not knobs.folds:
        return []
    parts = [cmapss.split(subset, [1 / knobs.folds] * knobs.folds, knobs.seed) for subset in fleet]
    return [[history for part in parts for history in part[k]] for k in range(knobs.folds)]


def execute(run: Run, knobs: Knobs) -> tuple[EngineHealth, float, Answer | None]:
    """Train one network on one core, and answer for its held-out engines."""
    torch.set_num_threads(1)
    network = build(run.train, knobs)
    loss = train(network, windows_of(run.train, network), knobs, run.name)
    return network, loss, predict(network, windows_of(run.held_out, network)) if run.held_out else None


def fit(fleet: list[list[History]], knobs: Knobs) -> dict[str, Any]:
    """Train everything, as many runs side by side as there are cores, and return the checkpoint."""
    started, runs = time.monotonic(), plan(fleet, knobs)
    workers = min(len(runs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(execute, runs, [knobs] * len(runs)))
    network, loss, _ = results[0]
    engines = runs[0].train
    answers = [answer for _, _, answer in results if answer is not None]
    return {
        "network": asdict(network.config),
        "weights": network.state_dict(),
        "knobs": asdict(knobs),
        "loss": loss,
        "held_out": _held_out(runs[1:], answers, engines),
        "subsets": [subset[0].engine_id.partition("-")[0] for subset in fleet],
        "data": {"sha256": data_digest(engines), "engines": len(engines), "rows": sum(len(h.cycle) for h in engines)},
        "split": {run.name.strip(): [len(run.train), len(run.held_out)] for run in runs},
        "made_with": {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()},
        "seconds": round(time.monotonic() - started),
    }


def _by_engine(engines: list[History], rows: Tensor) -> list[Tensor]:
    return list(torch.split(rows, [len(history.cycle) for history in engines]))


def _held_out(runs: list[Run], answers: list[Answer], engines: list[History]) -> dict[str, Tensor]:
    """What fold networks said of engines that they never saw, row by row in the order of the engines."""
    if not runs:
        return {}
    found = {
        name: {
            history.engine_id: rows
            for run, answer in zip(runs, answers, strict=True)
            for history, rows in zip(run.held_out, _by_engine(run.held_out, getattr(answer, name)), strict=True)
        }
        for name in ("logits", "rul", "bins")
        if getattr(answers[0], name) is not None
    }
    lengths = torch.tensor([len(history.cycle) for history in engines])
    return {name: torch.cat([rows[h.engine_id] for h in engines]) for name, rows in found.items()} | {
        "engine": torch.repeat_interleave(lengths),
        "true_rul": torch.from_numpy(np.concatenate([history.known_rul() for history in engines])),
        "weight": torch.from_numpy(np.concatenate([cmapss.cutoff_weights(history) for history in engines])),
    }


def data_digest(engines: list[History]) -> str:
    """sha256 over the ids and readings of engines, so that a manifest can name the data it came from."""
    sha = hashlib.sha256()
    for history in engines:
        sha.update(history.engine_id.encode() + history.telemetry.tobytes())
    return sha.hexdigest()


def load(path: Path) -> tuple[EngineHealth, dict[str, Any]]:
    """The network in evaluation mode and the rest of the file; tensors and plain values, no pickled code.

    Raises:
        DataError: no such file, or not a checkpoint that this code can read.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
        network = EngineHealth(NetworkConfig(**checkpoint["network"]))
        network.load_state_dict(checkpoint["weights"])
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a checkpoint of this version: {str(error).splitlines()[0]}") from None
    return network.eval(), checkpoint


def knob_parser(description: str) -> argparse.ArgumentParser:
    """A command line with one flag a knob."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = get_type_hints(Knobs)
    for knob in fields(Knobs):
        choices = get_args(hints[knob.name]) or None
        kind = str if choices else hints[knob.name]
        parser.add_argument(
            "--" + knob.name.replace("_", "-"), type=kind, choices=choices, default=knob.default, help=" "
        )
    return parser


def main() -> None:
    """Read C-MAPSS, train, write the checkpoint."""
    parser = knob_parser("Train on C-MAPSS and write a checkpoint.")
    parser.add_argument("--subsets", nargs="+", choices=cmapss.SUBSETS, default=cmapss.SUBSETS)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    flags = vars(parser.parse_args())
    subsets, output = flags.pop("subsets"), flags.pop("output")
    try:
        fleet = [cmapss.read_train(cmapss.data_folder(), subset) for subset in subsets]
        checkpoint = fit(fleet, Knobs(**flags))
    except DataError as error:
        raise SystemExit(f"train: {error} (set CMAPSS_DIR, or run `make data`)") from None
    except ValueError as error:
        raise SystemExit(f"train: {error}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, output)
    print(f"wrote {output}: loss {checkpoint['loss']:.4f}, {checkpoint['seconds']} s")


if __name__ == "__main__":
    main()
