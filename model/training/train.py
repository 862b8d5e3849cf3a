"""Train one network on run-to-failure histories: configuration, augmentation, training loop.

Engines are split, never windows. The number of epochs is configured; the result is the averaged weights after the last
epoch. The test engines are never used. Independent of files: `cross_fit` reads the data, trains each fold and writes
the checkpoint.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.contract import RUL_THRESHOLDS, SETTINGS
from model.data import cmapss
from model.data.cmapss import History
from model.training.backbones import WindowRows
from model.training.losses import balanced_weights, bin_loss, health_loss, rul_loss
from model.training.network import Backbone, EngineHealth, NetworkConfig, NetworkOutput, bin_edges, find_conditions


@dataclass(frozen=True)
class TrainingConfig:
    """Parameters of a training run. Together with data and code they determine its result."""

    window: int = 100
    backbone: Backbone = "rolling-mlp"
    head: Literal["distribution", "separate"] = "distribution"
    hidden: int = 320
    kernel: int = 6
    stride: int = 2
    dropout: float = 0.1
    epochs: int = 60
    windows_per_epoch: int = 60_000
    batch: int = 512
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    average: float = 0.995  # decay of the weight average, per step
    noise: float = 0.3  # standard deviations, drawn for each reading
    bias: float = 0.3  # standard deviations, drawn per sensor and window
    channel_dropout: float = 0.1  # probability that a sensor is missing
    late_start: float = 0.7  # probability that a window is shortened to its newest rows
    unknown_rows: float = 0.1  # probability that a window loses a random share of its rows
    rul_weight: float = 4.0
    bin_weight: float = 0.3  # weight of the log-likelihood of the RUL bins
    class_weights: Literal["none", "balanced"] = "none"
    focal_gamma: float = 0.0
    near_threshold: float = RUL_THRESHOLDS[1]
    far_threshold: float = RUL_THRESHOLDS[0]
    folds: int = 6  # of engines, each held out once
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for values that do not allow a run."""
        if not 0 < self.near_threshold < self.far_threshold:
            raise ValueError("thresholds must be 0 < near < far")
        if min(self.epochs, self.batch, self.windows_per_epoch, self.window) < 1:
            raise ValueError("epochs, batch, windows_per_epoch and window must be at least 1")
        if self.folds == 1 or self.folds < 0:
            raise ValueError("folds must be 0 (none is held out) or at least 2")

    @property
    def thresholds(self) -> tuple[float, float]:
        """RUL thresholds of the classes in cycles, in descending order."""
        return self.far_threshold, self.near_threshold


@dataclass(frozen=True)
class TrainingWindows:
    """Windows of many engines: normalised rows, and the ground truth of the last row of each window."""

    rows: Tensor  # (R, S) concatenated histories, each preceded by padding
    valid: Tensor  # (R, S) 1 where a reading counts
    first: Tensor  # (N,) index of the first row of each window
    padding: Tensor  # (N,) number of padding rows
    window: int
    engine: Tensor  # (N,) index of the engine
    rul: Tensor  # (N,) true RUL in cycles, not capped
    label: Tensor  # (N,) class index
    weight: Tensor  # (N,) frequency of the row in a live fleet

    def select(self, indices: Tensor) -> WindowRows:
        """Return copies of the windows (B, T, S) with these indices (B,)."""
        time = torch.arange(self.window)
        rows = self.first[indices].unsqueeze(1) + time  # (B, T)
        return WindowRows(self.rows[rows], self.valid[rows], (time >= self.padding[indices].unsqueeze(1)).float())


def build_windows(engines: list[History], network: EngineHealth) -> TrainingWindows:
    """Return every window of every engine, normalised, with labels from the true RUL."""
    window, rul = network.config.window, np.concatenate([history.require_rul() for history in engines])
    lengths = torch.tensor([len(history.cycle) for history in engines])
    age = torch.cat([torch.arange(length) for length in lengths.tolist()])
    first_row = torch.cumsum(lengths + window - 1, 0) - lengths - window + 1  # (E,) rows of preceding engines
    engine = torch.repeat_interleave(lengths)
    padded = [np.concatenate([np.repeat(h.telemetry[:1], window - 1, axis=0), h.telemetry]) for h in engines]
    with torch.inference_mode():
        parts = [network.normalise(torch.from_numpy(rows).unsqueeze(0)) for rows in padded]
    return TrainingWindows(
        torch.cat([part.normalised[0] for part in parts]),
        torch.cat([part.valid[0] for part in parts]),
        first_row[engine] + age,
        (window - 1 - age).clamp(min=0),
        window,
        engine,
        torch.from_numpy(rul).float(),
        torch.from_numpy(cmapss.health_classes(rul, network.config.thresholds)),
        torch.from_numpy(np.concatenate([cmapss.cutoff_weights(history) for history in engines])).float(),
    )


def predict_windows(network: EngineHealth, windows: TrainingWindows, batch: int = 4096) -> NetworkOutput:
    """Return the network's output for all windows, in batches, without gradients."""
    network.eval()
    with torch.inference_mode():
        batches = torch.split(torch.arange(len(windows.first)), batch)
        parts = [network.predict_rows(windows.select(indices)) for indices in batches]
    bins = [part.bins for part in parts if part.bins is not None]
    logits, rul = (torch.cat(column) for column in ([part.logits for part in parts], [part.rul for part in parts]))
    return NetworkOutput(logits, rul, torch.cat(bins) if bins else None)


def sample_batches(windows: TrainingWindows, config: TrainingConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield indices of the windows of one epoch, sampled with the frequencies of a live fleet."""
    count = min(config.windows_per_epoch, len(windows.first))
    indices = torch.multinomial(windows.weight, count, True, generator=generator)
    yield from torch.split(indices, config.batch)


def add_noise(rows: WindowRows, config: TrainingConfig, generator: torch.Generator) -> WindowRows:
    """Add noise to each reading and a bias to each sensor of a window, and mark some sensors as missing.

    Noise and bias are in standard deviations of the operating condition. Half of the missing sensors are missing in
    the whole window, the others in its newest rows. Settings, which precede the sensors for some backbones, stay.
    """
    batch, window, count = rows.valid.shape
    settings, sensors = rows.normalised[..., :-count], rows.normalised[..., -count:]
    window_shape = (batch, 1, count)
    noise = torch.randn(sensors.shape, generator=generator) * config.noise
    bias = torch.randn(window_shape, generator=generator) * config.bias
    missing = torch.rand(window_shape, generator=generator) < config.channel_dropout
    since = torch.randint(-window, window, window_shape, generator=generator)
    present = ~(missing & (torch.arange(window).view(1, -1, 1) >= since))
    noisy = torch.cat([settings, (sensors + noise + bias) * present], dim=-1)
    return WindowRows(noisy, rows.valid * present, rows.observed)


def late_start(rows: WindowRows, config: TrainingConfig, generator: torch.Generator) -> WindowRows:
    """Shorten some windows to their newest rows, and pad them with the oldest remaining row.

    If recording starts in mid-life, the history of an old engine is short. Without this augmentation the network would
    take it for a new engine. Short lengths are sampled more often.
    """
    batch, window = rows.observed.shape
    late = torch.rand(batch, generator=generator) < config.late_start
    length = (torch.rand(batch, generator=generator).square() * window).ceil().clamp(min=1)
    first = ((window - length).long() * late).unsqueeze(1)  # (B, 1)
    time = torch.arange(window).unsqueeze(0)
    source, remaining = torch.maximum(time, first).unsqueeze(-1), time >= first  # (B, T, 1), (B, T)
    sensors = rows.normalised.gather(1, source.expand_as(rows.normalised))
    return WindowRows(sensors, rows.valid * remaining.unsqueeze(-1), rows.observed * remaining)


def drop_rows(rows: WindowRows, config: TrainingConfig, generator: torch.Generator) -> WindowRows:
    """Mark a random share of the rows of some windows as invalid, as unknown operating conditions do."""
    share = torch.rand(len(rows.observed), 1, generator=generator) * 1.1
    affected = torch.rand(len(rows.observed), 1, generator=generator) < config.unknown_rows
    dropped = (affected & (torch.rand(rows.observed.shape, generator=generator) < share)).unsqueeze(-1)
    return WindowRows(rows.normalised * ~dropped, rows.valid * ~dropped, rows.observed)


class Objective:
    """The loss of a batch: classes, RUL, and the likelihood of RUL bins if the head returns them."""

    def __init__(self, network_config: NetworkConfig, windows: TrainingWindows, config: TrainingConfig) -> None:
        self._windows, self._config, self._edges = windows, config, bin_edges(network_config)
        counts = torch.bincount(windows.label, windows.weight, minlength=network_config.classes)
        self._class_weights = balanced_weights(counts).float() if config.class_weights == "balanced" else None

    def __call__(self, output: NetworkOutput, indices: Tensor) -> Tensor:
        """Return the mean loss over the windows with these indices (B,), a scalar."""
        config, rul, labels = self._config, self._windows.rul[indices], self._windows.label[indices]
        loss = health_loss(output.logits, labels, self._class_weights, config.focal_gamma).mean()
        loss = loss + config.rul_weight * rul_loss(output.rul, rul).mean()
        if output.bins is not None:
            loss = loss + config.bin_weight * bin_loss(output.bins, rul, self._edges).mean()
        return loss


def train_network(network: EngineHealth, windows: TrainingWindows, config: TrainingConfig, name: str) -> float:
    """Train `network` in place to averaged weights. Print one line per epoch and return the last epoch's loss."""
    generator = torch.Generator().manual_seed(config.seed)
    averaged, drawn = copy.deepcopy(network), min(config.windows_per_epoch, len(windows.first))
    optimiser = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * -(-drawn // config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=steps)
    loss_of = Objective(network.config, windows, config)
    mean = float("nan")
    for epoch in range(1, config.epochs + 1):
        started, total = time.monotonic(), 0.0
        network.train()
        for indices in sample_batches(windows, config, generator):
            rows = late_start(windows.select(indices), config, generator)
            output = network.predict_rows(drop_rows(add_noise(rows, config, generator), config, generator))
            loss = loss_of(output, indices)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(indices)
            for slow, fast in zip(averaged.parameters(), network.parameters(), strict=True):
                slow.data.lerp_(fast.data, 1 - config.average)
            for average, current in zip(averaged.buffers(), network.buffers(), strict=True):
                average.copy_(current)  # batch statistics are running averages already
        mean = total / drawn
        print(
            f"{name}  epoch {epoch:2d}/{config.epochs}  loss {mean:.4f}  {time.monotonic() - started:3.0f} s",
            flush=True,
        )
    if not np.isfinite(mean):
        raise RuntimeError(f"{name}: the loss is not finite; lower the learning rate")
    network.load_state_dict(averaged.state_dict())
    network.eval()
    return mean


def build_network(train_engines: list[History], config: TrainingConfig) -> EngineHealth:
    """Return an untrained network whose normaliser is fitted on training engines."""
    rows = np.concatenate([history.telemetry for history in train_engines])
    conditions = len(find_conditions(rows[:, : len(SETTINGS)])[0])
    torch.manual_seed(config.seed)
    network = EngineHealth(
        NetworkConfig(
            config.window,
            conditions,
            config.thresholds,
            config.backbone,
            config.head,
            hidden=config.hidden,
            kernel=config.kernel,
            stride=config.stride,
            dropout=config.dropout,
        )
    )
    network.normalise.fit(rows)
    return network
