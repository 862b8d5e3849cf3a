"""Train one network on run-to-failure histories: knobs, one loop, a seed.

Engines are split, never windows. The best epoch is the one whose averaged weights have the lowest cross-entropy on
validation engines, weighed as if cut off at random cycles; the test engines are never looked at. Knows no files:
`model.fit` reads the data, runs this for every fold and writes the checkpoint.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model import cmapss
from model.cmapss import History
from model.contract import RUL_CAP, RUL_THRESHOLDS, SETTINGS
from model.losses import balanced_weights, bin_loss, health_loss, rul_loss, weighted_mean
from model.network import EngineHealth, NetworkConfig, bin_edges, find_conditions
from model.windows import every_window


@dataclass(frozen=True)
class Knobs:
    """Everything that a run depends on besides the data and the code."""

    window: int = 80
    backbone: Literal["conv-gru", "cnn-bilstm-attention"] = "conv-gru"
    head: Literal["distribution", "separate"] = "distribution"
    hidden: int = 64
    kernel: int = 6
    stride: int = 2
    dropout: float = 0.3
    epochs: int = 12
    windows_per_epoch: int = 60_000
    batch: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    average: float = 0.995  # of the weights, a step
    noise: float = 0.3  # deviations, fresh for every reading
    bias: float = 0.3  # deviations, one a sensor and window
    channel_dropout: float = 0.1  # how often a sensor is silent through a whole window
    rul_weight: float = 4.0
    bin_weight: float = 0.3  # of the RUL distribution's own log-likelihood
    class_weights: Literal["none", "balanced"] = "none"
    focal_gamma: float = 0.0
    near_threshold: float = RUL_THRESHOLDS[1]
    far_threshold: float = RUL_THRESHOLDS[0]
    validation_share: float = 0.1  # of the engines, to choose the epoch
    folds: int = 6  # of engines, each held out once to measure what the network says of engines it never saw
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse knobs that no run can follow."""
        if not 0 < self.near_threshold < self.far_threshold:
            raise ValueError("thresholds must be 0 < near < far")
        if min(self.epochs, self.batch, self.windows_per_epoch, self.window) < 1:
            raise ValueError("epochs, batch, windows_per_epoch and window must be at least 1")
        if self.folds < 2 or not 0 < self.validation_share < 1:
            raise ValueError("training needs two folds at least, and a share of the engines to validate on")

    @property
    def thresholds(self) -> tuple[float, float]:
        """RUL thresholds of the classes, falling."""
        return self.far_threshold, self.near_threshold


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


def predict(network: EngineHealth, windows: Windows, batch: int = 2048) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and RUL (N,) of all windows, without gradients."""
    network.eval()
    with torch.inference_mode():
        parts = [network(windows.take(rows)) for rows in torch.split(torch.arange(len(windows.row)), batch)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([rul for _, rul in parts])


def batches(windows: Windows, knobs: Knobs, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one epoch, drawn as often as a live fleet would show them."""
    rows = torch.multinomial(windows.weight, min(knobs.windows_per_epoch, len(windows.row)), True, generator=generator)
    yield from torch.split(rows, knobs.batch)


def disturb(sensors: Tensor, knobs: Knobs, generator: torch.Generator) -> Tensor:
    """Noise on every reading, a bias on every sensor of a window, and some sensors silent (at their mean) through it.

    In deviations of the operating condition.
    """
    a_window = (len(sensors), 1, sensors.shape[2])
    noise = torch.randn(sensors.shape, generator=generator) * knobs.noise
    bias = torch.randn(a_window, generator=generator) * knobs.bias
    return (sensors + noise + bias) * (torch.rand(a_window, generator=generator) >= knobs.channel_dropout)


def validate(network: EngineHealth, windows: Windows) -> tuple[float, float]:
    """Cross-entropy in nats and RUL RMSE in cycles, weighed as a live fleet shows its rows."""
    logits, rul = predict(network, windows)
    nll = weighted_mean(health_loss(logits, windows.label), windows.weight)
    mse = weighted_mean(rul_loss(rul, windows.rul), windows.weight)
    return float(nll), float(mse.sqrt() * RUL_CAP)


@dataclass
class Best:
    """The epoch to keep, and its averaged weights."""

    epoch: int = 0
    validation_nll: float = float("inf")
    validation_rul_rmse: float = float("inf")
    weights: dict[str, Tensor] = field(default_factory=dict)


def train(network: EngineHealth, windows: Windows, validation: Windows, knobs: Knobs, name: str) -> Best:
    """The loop. Leaves the best epoch's averaged weights in `network`; prints a line an epoch, starting with `name`."""
    generator = torch.Generator().manual_seed(knobs.seed)
    averaged, best = copy.deepcopy(network), Best()
    drawn = min(knobs.windows_per_epoch, len(windows.row))
    optimiser = torch.optim.AdamW(network.parameters(), knobs.learning_rate, weight_decay=knobs.weight_decay)
    steps = knobs.epochs * -(-drawn // knobs.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, knobs.learning_rate, total_steps=steps)
    edges = bin_edges(network.config)
    counts = torch.bincount(windows.label, windows.weight, minlength=network.config.classes)
    class_weights = balanced_weights(counts).float() if knobs.class_weights == "balanced" else None
    for epoch in range(1, knobs.epochs + 1):
        started, total = time.monotonic(), torch.zeros(2)
        network.train()
        for rows in batches(windows, knobs, generator):
            answer = network.heads(disturb(network.normalise(windows.take(rows)), knobs, generator))
            health = health_loss(answer.logits, windows.label[rows], class_weights, knobs.focal_gamma).mean()
            remaining = rul_loss(answer.rul, windows.rul[rows]).mean()
            loss = health + knobs.rul_weight * remaining
            if answer.bins is not None:
                loss = loss + knobs.bin_weight * bin_loss(answer.bins, windows.rul[rows], edges).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it so
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += torch.stack([health, remaining]).detach() * len(rows)
            for slow, fast in zip(averaged.parameters(), network.parameters(), strict=True):
                slow.data.lerp_(fast.data, 1 - knobs.average)
            for kept, running in zip(averaged.buffers(), network.buffers(), strict=True):
                kept.copy_(running)  # batch statistics are averages already
        nll, rmse = validate(averaged, validation)
        if nll < best.validation_nll:
            best = Best(epoch, nll, rmse, copy.deepcopy(averaged.state_dict()))
        health_mean, rul_mean = (total / drawn).tolist()
        mark = " *" if best.epoch == epoch else ""
        print(
            f"{name}  epoch {epoch:2d}/{knobs.epochs}  loss {health_mean:.4f}  rul loss {rul_mean:.4f}  "
            f"validation NLL {nll:.4f}  RUL RMSE {rmse:5.2f}  {time.monotonic() - started:3.0f} s{mark}",
            flush=True,
        )
    if not best.epoch:
        raise RuntimeError(f"{name}: no epoch had a finite validation loss; lower the learning rate")
    network.load_state_dict(best.weights)
    return best


def build(train_engines: list[History], knobs: Knobs) -> EngineHealth:
    """An untrained network, its normaliser fitted on training engines."""
    rows = np.concatenate([history.telemetry for history in train_engines])
    conditions = len(find_conditions(rows[:, : len(SETTINGS)])[0])
    torch.manual_seed(knobs.seed)
    network = EngineHealth(
        NetworkConfig(
            knobs.window,
            conditions,
            knobs.thresholds,
            knobs.backbone,
            knobs.head,
            hidden=knobs.hidden,
            kernel=knobs.kernel,
            stride=knobs.stride,
            dropout=knobs.dropout,
        )
    )
    network.normalise.fit(rows)
    return network
