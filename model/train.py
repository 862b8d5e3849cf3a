"""Train the network on run-to-failure histories: knobs, one loop, a seed, a checkpoint that explains itself.

    python -m model.train --epochs 30 --seed 0

Engines are split, never windows. The best epoch is the one whose averaged weights have the lowest cross-entropy on
validation engines, weighed as if cut off at random cycles; the test engines are never looked at.
"""

import argparse
import copy
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model import cmapss
from model.cmapss import History
from model.contract import RUL_THRESHOLDS
from model.losses import balanced_weights, health_loss, rul_loss, weighted_mean
from model.network import EngineHealth, NetworkConfig, find_conditions
from model.windows import every_window


@dataclass(frozen=True)
class Knobs:
    """Everything that a training run depends on besides the data and the code."""

    window: int = 50
    hidden: int = 64
    kernel: int = 5
    dropout: float = 0.2
    epochs: int = 30
    windows_per_epoch: int = 60_000
    batch: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    average: float = 0.995  # of the weights, a step
    noise: float = 0.1  # deviations, fresh for every reading
    bias: float = 0.1  # deviations, one a sensor and window
    rul_weight: float = 4.0
    class_weights: Literal["none", "balanced"] = "none"
    focal_gamma: float = 0.0
    near_threshold: float = RUL_THRESHOLDS[1]
    far_threshold: float = RUL_THRESHOLDS[0]
    validation_share: float = 0.1
    calibration_share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Windows:
    """Windows of many engines: views on their padded histories, and what is true of each last row."""

    telemetry: list[np.ndarray[Any, np.dtype[np.float32]]]  # one (T, window, C) view an engine
    engine: Tensor  # (N,) which engine
    row: Tensor  # (N,) which of its windows
    rul: Tensor  # (N,) cycles, true and uncapped
    label: Tensor  # (N,) class index
    weight: Tensor  # (N,) how often a live fleet would show this row

    def take(self, rows: Tensor) -> Tensor:
        """The windows (len(rows), window, C), copied out."""
        picked = zip(self.engine[rows].tolist(), self.row[rows].tolist(), strict=True)
        return torch.from_numpy(np.stack([self.telemetry[engine][row] for engine, row in picked]))


def windows_of(engines: list[History], window: int, thresholds: tuple[float, float]) -> Windows:
    """Every window of every engine, with labels from the true RUL."""
    rul = np.concatenate([history.known_rul() for history in engines])
    lengths = [len(history.cycle) for history in engines]
    return Windows(
        [every_window(history.telemetry, window) for history in engines],
        torch.from_numpy(np.repeat(np.arange(len(engines)), lengths)),
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        torch.from_numpy(rul).float(),
        torch.from_numpy(cmapss.health(rul, thresholds)),
        torch.from_numpy(np.concatenate([cmapss.cutoff_weights(history) for history in engines])).float(),
    )


def split_fleet(folder: Path, knobs: Knobs) -> dict[str, list[History]]:
    """Training, validation (choice of the epoch) and calibration (temperature, thresholds) engines of all subsets."""
    shares = (1 - knobs.validation_share - knobs.calibration_share, knobs.validation_share, knobs.calibration_share)
    parts = [cmapss.split(cmapss.read_train(folder, subset), shares, knobs.seed) for subset in cmapss.SUBSETS]
    return {name: [engine for part in parts for engine in part[i]] for i, name in enumerate(("train", "validation", "calibration"))}


def predict(network: EngineHealth, windows: Windows, batch: int = 2048) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and RUL (N,) of all windows, without gradients."""
    network.eval()
    with torch.inference_mode():
        parts = [network(windows.take(rows)) for rows in torch.arange(len(windows.row)).split(batch)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([rul for _, rul in parts])


def batches(windows: Windows, knobs: Knobs, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one epoch, drawn as often as a live fleet would show them."""
    rows = torch.multinomial(windows.weight, min(knobs.windows_per_epoch, len(windows.row)), True, generator=generator)
    yield from rows.split(knobs.batch)


def disturb(sensors: Tensor, knobs: Knobs, generator: torch.Generator) -> Tensor:
    """Noise on every reading and a bias on every sensor of a window, in deviations of the operating condition."""
    noise = torch.randn(sensors.shape, generator=generator) * knobs.noise
    bias = torch.randn((len(sensors), 1, sensors.shape[2]), generator=generator) * knobs.bias
    return sensors + noise + bias


def validate(network: EngineHealth, windows: Windows) -> tuple[float, float]:
    """Cross-entropy in nats and RUL RMSE in cycles, weighed as a live fleet shows its rows."""
    logits, rul = predict(network, windows)
    nll = weighted_mean(health_loss(logits, windows.label), windows.weight)
    mse = weighted_mean(rul_loss(rul, windows.rul), windows.weight)
    return float(nll), float(mse.sqrt() * 125)


def train(train_windows: Windows, validation: Windows, network: EngineHealth, knobs: Knobs) -> dict[str, Any]:
    """The loop. Leaves the best epoch's averaged weights in `network`; returns what the checkpoint says of the run."""
    generator = torch.Generator().manual_seed(knobs.seed)
    averaged, best = copy.deepcopy(network), {"epoch": 0, "validation_nll": float("inf")}
    best_weights = network.state_dict()
    steps = knobs.epochs * -(-min(knobs.windows_per_epoch, len(train_windows.row)) // knobs.batch)
    optimiser = torch.optim.AdamW(network.parameters(), knobs.learning_rate, weight_decay=knobs.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, knobs.learning_rate, total_steps=steps)
    class_weights = balanced_weights(torch.bincount(train_windows.label, train_windows.weight)) if knobs.class_weights == "balanced" else None
    for epoch in range(1, knobs.epochs + 1):
        started, total = time.monotonic(), torch.zeros(2)
        network.train()
        for rows in batches(train_windows, knobs, generator):
            logits, rul = network.heads(disturb(network.normalise(train_windows.take(rows)), knobs, generator))
            health = health_loss(logits, train_windows.label[rows], class_weights, knobs.focal_gamma).mean()
            remaining = rul_loss(rul, train_windows.rul[rows]).mean()
            optimiser.zero_grad()
            (health + knobs.rul_weight * remaining).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += torch.stack([health, remaining]).detach() * len(rows)
            for slow, fast in zip(averaged.parameters(), network.parameters(), strict=True):
                slow.data.lerp_(fast.data, 1 - knobs.average)
        nll, rmse = validate(averaged, validation)
        if nll < best["validation_nll"]:
            best = {"epoch": epoch, "validation_nll": nll, "validation_rul_rmse": rmse}
            best_weights = copy.deepcopy(averaged.state_dict())
        health_mean, rul_mean = (total / min(knobs.windows_per_epoch, len(train_windows.row))).tolist()
        print(f"epoch {epoch:3d}/{knobs.epochs}  loss {health_mean:.4f}  rul loss {rul_mean:.4f}  validation NLL {nll:.4f}  RUL RMSE {rmse:5.2f}  {time.monotonic() - started:.0f} s{'  *' if best['epoch'] == epoch else ''}", flush=True)
    network.load_state_dict(best_weights)
    return best


def build(train_engines: list[History], knobs: Knobs) -> EngineHealth:
    """An untrained network, its normaliser fitted on training engines."""
    rows = np.concatenate([history.telemetry for history in train_engines])
    conditions = len(find_conditions(rows[:, :3])[0])
    network = EngineHealth(NetworkConfig(knobs.window, conditions, hidden=knobs.hidden, kernel=knobs.kernel, dropout=knobs.dropout))
    network.normalise.fit(rows)
    return network


def data_digest(engines: list[History]) -> str:
    """sha256 over the ids and readings of engines, so that a manifest can name the data it came from."""
    sha = hashlib.sha256()
    for history in engines:
        sha.update(history.engine_id.encode() + history.telemetry.tobytes())
    return sha.hexdigest()
