"""From data to checkpoint: the shipped network, and what fold networks say of engines that they never saw.

    python -m model.fit --epochs 12 --seed 0        # = make train

Each fold network is trained like the shipped one on the other folds; its answers on its own fold are the held-out
answers that temperature, prediction sets and references are made of (`model.calibrate`). Runs use a core each.
"""

import argparse
import hashlib
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args, get_type_hints

import numpy as np
import torch

from model import cmapss
from model.cmapss import DataError, History
from model.network import EngineHealth, NetworkConfig
from model.train import Best, Knobs, build, predict, train, windows_of

CHECKPOINT = Path("build/checkpoint.pt")


@dataclass(frozen=True)
class HeldOut:
    """What fold networks answered for every row of engines that they never saw. All of length N but `logits` (N, C)."""

    engine: torch.Tensor
    logits: torch.Tensor
    rul: torch.Tensor
    true_rul: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Run:
    """One training: on which engines, which choose the epoch, and which are only answered for."""

    name: str
    train: list[History]
    validation: list[History]
    held_out: list[History]


def plan(fleet: list[list[History]], knobs: Knobs) -> list[Run]:
    """The shipped run, then one for each fold; every subset is dealt out evenly."""
    folds = _deal(fleet, [1 / knobs.folds] * knobs.folds, knobs.seed)
    runs = [Run("shipped", *_hold_back(fleet, knobs), [])]
    for k, held_out in enumerate(folds):
        away = {history.engine_id for history in held_out}
        rest = [[history for history in subset if history.engine_id not in away] for subset in fleet]
        runs.append(Run(f"fold {k + 1} ", *_hold_back(rest, knobs), held_out))
    return runs


def _deal(fleet: list[list[History]], shares: list[float], seed: int) -> list[list[History]]:
    parts = [cmapss.split(subset, shares, seed) for subset in fleet]
    return [[history for part in parts for history in part[k]] for k in range(len(shares))]


def _hold_back(fleet: list[list[History]], knobs: Knobs) -> tuple[list[History], list[History]]:
    kept, validation = _deal(fleet, [1 - knobs.validation_share, knobs.validation_share], knobs.seed + 1)
    return kept, validation


def execute(run: Run, knobs: Knobs) -> tuple[EngineHealth, Best, tuple[torch.Tensor, torch.Tensor] | None]:
    """Train one network on one core, and answer for its held-out engines."""
    torch.set_num_threads(1)
    network = build(run.train, knobs)
    learn, validate = (windows_of(engines, knobs.window, knobs.thresholds) for engines in (run.train, run.validation))
    best = train(network, learn, validate, knobs, run.name)
    answers = predict(network, windows_of(run.held_out, knobs.window, knobs.thresholds)) if run.held_out else None
    return network, best, answers


def fit(fleet: list[list[History]], knobs: Knobs) -> dict[str, Any]:
    """Train everything, two or more runs side by side, and return the checkpoint."""
    started, runs = time.monotonic(), plan(fleet, knobs)
    workers = min(len(runs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(execute, runs, [knobs] * len(runs)))
    network, best, _ = results[0]
    engines = [history for subset in fleet for history in subset]
    return {
        "network": asdict(network.config),
        "weights": network.state_dict(),
        "knobs": asdict(knobs),
        "best": {key: value for key, value in vars(best).items() if key != "weights"},
        "fold_validation_nll": [best.validation_nll for _, best, _ in results[1:]],
        "held_out": vars(_held_out(runs[1:], [answers for _, _, answers in results[1:]], engines, knobs)),
        "subsets": [subset[0].engine_id.partition("-")[0] for subset in fleet],
        "data": {"sha256": data_digest(engines), "engines": len(engines), "rows": sum(len(h.cycle) for h in engines)},
        "split": {run.name.strip(): [len(run.train), len(run.validation), len(run.held_out)] for run in runs},
        "made_with": {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()},
        "seconds": round(time.monotonic() - started),
    }


def _held_out(runs: list[Run], answers: list[Any], engines: list[History], knobs: Knobs) -> HeldOut:
    place = {history.engine_id: i for i, history in enumerate(engines)}
    parts = [windows_of(run.held_out, knobs.window, knobs.thresholds) for run in runs]
    engine = [
        torch.tensor([place[h.engine_id] for h in run.held_out])[part.engine]
        for run, part in zip(runs, parts, strict=True)
    ]
    return HeldOut(
        torch.cat(engine),
        torch.cat([logits for logits, _ in answers]),
        torch.cat([rul for _, rul in answers]),
        torch.cat([part.rul for part in parts]),
        torch.cat([part.weight for part in parts]),
    )


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
    print(f"wrote {output}: epoch {checkpoint['best']['epoch']}, {checkpoint['seconds']} s")


if __name__ == "__main__":
    main()
