"""Train one network on run-to-failure histories: knobs, one loop, a seed.

Engines are split, never windows. The length of the training is a knob: averaged weights after the last epoch are kept.
The test engines are never looked at. Knows no files: `cross_fit` reads the data, runs this for every fold and writes
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
from model.training.backbones import Rows
from model.training.losses import balanced_weights, bin_loss, health_loss, rul_loss
from model.training.network import Answer, Backbone, EngineHealth, NetworkConfig, bin_edges, find_conditions


@dataclass(frozen=True)
class Knobs:
    """Everything that a run depends on besides the data and the code."""

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
    average: float = 0.995  # of the weights, a step
    noise: float = 0.3  # deviations, fresh for every reading
    bias: float = 0.3  # deviations, one a sensor and window
    channel_dropout: float = 0.1  # how often a sensor is silent through a whole window
    late_start: float = 0.7  # how often a history begins in its window, the engine being older
    unknown_rows: float = 0.1  # how often a window loses a random share of its rows
    rul_weight: float = 4.0
    bin_weight: float = 0.3  # of the RUL distribution's own log-likelihood
    class_weights: Literal["none", "balanced"] = "none"
    focal_gamma: float = 0.0
    near_threshold: float = RUL_THRESHOLDS[1]
    far_threshold: float = RUL_THRESHOLDS[0]
    folds: int = 6  # of engines, each held out once to measure what the network says of engines it never saw
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse knobs that no run can follow."""
        if not 0 < self.near_threshold < self.far_threshold:
            raise ValueError("thresholds must be 0 < near < far")
        if min(self.epochs, self.batch, self.windows_per_epoch, self.window) < 1:
            raise ValueError("epochs, batch, windows_per_epoch and window must be at least 1")
        if self.folds == 1 or self.folds < 0:
            raise ValueError("folds must be 0 (none is held out) or at least 2")

    @property
    def thresholds(self) -> tuple[float, float]:
        """RUL thresholds of the classes, falling."""
        return self.far_threshold, self.near_threshold


@dataclass(frozen=True)
class Windows:
    """Windows of many engines: their rows, normalised once, and what is true of each window's last row."""

    rows: Tensor  # (R, S) all histories, one after the other, each with its padding in front
    says: Tensor  # (R, S) 1 where a reading counts
    first: Tensor  # (N,) where a window begins in the rows
    padding: Tensor  # (N,) how many of its rows are padding
    window: int
    engine: Tensor  # (N,) which engine
    rul: Tensor  # (N,) cycles, true and uncapped
    label: Tensor  # (N,) class index
    weight: Tensor  # (N,) how often a live fleet would show this row

    def take(self, picked: Tensor) -> Rows:
        """The picked windows (B, T, S), copied out."""
        time = torch.arange(self.window)
        rows = self.first[picked].unsqueeze(1) + time  # (B, T)
        return Rows(self.rows[rows], self.says[rows], (time >= self.padding[picked].unsqueeze(1)).float())


def windows_of(engines: list[History], network: EngineHealth) -> Windows:
    """Every window of every engine as the network sees it, with labels from the true RUL."""
    window, rul = network.config.window, np.concatenate([history.known_rul() for history in engines])
    lengths = torch.tensor([len(history.cycle) for history in engines])
    age = torch.cat([torch.arange(length) for length in lengths.tolist()])
    before = torch.cumsum(lengths + window - 1, 0) - lengths - window + 1  # rows of the engines before, (E,)
    engine = torch.repeat_interleave(lengths)
    padded = [np.concatenate([np.repeat(h.telemetry[:1], window - 1, axis=0), h.telemetry]) for h in engines]
    with torch.inference_mode():
        parts = [network.normalise(torch.from_numpy(one).unsqueeze(0)) for one in padded]
    return Windows(
        torch.cat([part.normal[0] for part in parts]),
        torch.cat([part.says[0] for part in parts]),
        before[engine] + age,
        (window - 1 - age).clamp(min=0),
        window,
        engine,
        torch.from_numpy(rul).float(),
        torch.from_numpy(cmapss.health(rul, network.config.thresholds)),
        torch.from_numpy(np.concatenate([cmapss.cutoff_weights(history) for history in engines])).float(),
    )


def predict(network: EngineHealth, windows: Windows, batch: int = 4096) -> Answer:
    """What the network says of all windows, without gradients."""
    network.eval()
    with torch.inference_mode():
        picks = torch.split(torch.arange(len(windows.first)), batch)
        parts = [network.heads(windows.take(picked)) for picked in picks]
    bins = [part.bins for part in parts if part.bins is not None]
    logits, rul = (torch.cat(column) for column in ([part.logits for part in parts], [part.rul for part in parts]))
    return Answer(logits, rul, torch.cat(bins) if bins else None)


def batches(windows: Windows, knobs: Knobs, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one epoch, drawn as often as a live fleet would show them."""
    rows = torch.multinomial(
        windows.weight, min(knobs.windows_per_epoch, len(windows.first)), True, generator=generator
    )
    yield from torch.split(rows, knobs.batch)


def disturb(rows: Rows, knobs: Knobs, generator: torch.Generator) -> Rows:
    """Noise on every reading, a bias on every sensor of a window, and some sensors silent.

    In deviations of the operating condition. Half of the silent sensors are so through the whole window, the others
    through its newest rows. Settings, which stand before the sensors for some backbones, are left as they are.
    """
    batch, window, sensors = rows.says.shape
    settings, normal = rows.normal[..., :-sensors], rows.normal[..., -sensors:]
    a_window = (batch, 1, sensors)
    noise = torch.randn(normal.shape, generator=generator) * knobs.noise
    bias = torch.randn(a_window, generator=generator) * knobs.bias
    silent = torch.rand(a_window, generator=generator) < knobs.channel_dropout
    since = torch.randint(-window, window, a_window, generator=generator)
    speaks = ~(silent & (torch.arange(window).view(1, -1, 1) >= since))
    disturbed = torch.cat([settings, (normal + noise + bias) * speaks], dim=-1)
    return Rows(disturbed, rows.says * speaks, rows.real)


def begin_late(rows: Rows, knobs: Knobs, generator: torch.Generator) -> Rows:
    """Some windows cut to their newest rows, and padded anew with the oldest that is left.

    Who starts to record an engine in mid-life sends a short history of an old engine; taken for the whole history it
    would look like a new one. Short histories, which need it most, are drawn more often.
    """
    batch, window = rows.real.shape
    late = torch.rand(batch, generator=generator) < knobs.late_start
    length = (torch.rand(batch, generator=generator).square() * window).ceil().clamp(min=1)
    begins = ((window - length).long() * late).unsqueeze(1)  # (B, 1)
    time = torch.arange(window).unsqueeze(0)
    source, kept = torch.maximum(time, begins).unsqueeze(-1), time >= begins  # (B, T, 1), (B, T)
    normal = rows.normal.gather(1, source.expand_as(rows.normal))
    return Rows(normal, rows.says * kept.unsqueeze(-1), rows.real * kept)


def forget(rows: Rows, knobs: Knobs, generator: torch.Generator) -> Rows:
    """Some windows lose a random share of their rows, now and then all, as in unknown operating conditions."""
    share = torch.rand(len(rows.real), 1, generator=generator) * 1.1
    hit = torch.rand(len(rows.real), 1, generator=generator) < knobs.unknown_rows
    lost = (hit & (torch.rand(rows.real.shape, generator=generator) < share)).unsqueeze(-1)
    return Rows(rows.normal * ~lost, rows.says * ~lost, rows.real)


class Objective:
    """The loss of a batch: classes, RUL, and the likelihood of the RUL distribution if the head gives one."""

    def __init__(self, config: NetworkConfig, windows: Windows, knobs: Knobs) -> None:
        self._windows, self._knobs, self._edges = windows, knobs, bin_edges(config)
        counts = torch.bincount(windows.label, windows.weight, minlength=config.classes)
        self._class_weights = balanced_weights(counts).float() if knobs.class_weights == "balanced" else None

    def __call__(self, answer: Answer, picked: Tensor) -> Tensor:
        """The mean over the picked rows, a scalar."""
        knobs, rul, labels = self._knobs, self._windows.rul[picked], self._windows.label[picked]
        loss = health_loss(answer.logits, labels, self._class_weights, knobs.focal_gamma).mean()
        loss = loss + knobs.rul_weight * rul_loss(answer.rul, rul).mean()
        if answer.bins is not None:
            loss = loss + knobs.bin_weight * bin_loss(answer.bins, rul, self._edges).mean()
        return loss


def train(network: EngineHealth, windows: Windows, knobs: Knobs, name: str) -> float:
    """The loop. Leaves averaged weights in `network` and returns the last epoch's loss; prints a line an epoch."""
    generator = torch.Generator().manual_seed(knobs.seed)
    averaged, drawn = copy.deepcopy(network), min(knobs.windows_per_epoch, len(windows.first))
    optimiser = torch.optim.AdamW(network.parameters(), knobs.learning_rate, weight_decay=knobs.weight_decay)
    steps = knobs.epochs * -(-drawn // knobs.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, knobs.learning_rate, total_steps=steps)
    loss_of = Objective(network.config, windows, knobs)
    mean = float("nan")
    for epoch in range(1, knobs.epochs + 1):
        started, total = time.monotonic(), 0.0
        network.train()
        for picked in batches(windows, knobs, generator):
            rows = begin_late(windows.take(picked), knobs, generator)
            answer = network.heads(forget(disturb(rows, knobs, generator), knobs, generator))
            loss = loss_of(answer, picked)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it so
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(picked)
            for slow, fast in zip(averaged.parameters(), network.parameters(), strict=True):
                slow.data.lerp_(fast.data, 1 - knobs.average)
            for kept, running in zip(averaged.buffers(), network.buffers(), strict=True):
                kept.copy_(running)  # batch statistics are averages already
        mean = total / drawn
        print(
            f"{name}  epoch {epoch:2d}/{knobs.epochs}  loss {mean:.4f}  {time.monotonic() - started:3.0f} s", flush=True
        )
    if not np.isfinite(mean):
        raise RuntimeError(f"{name}: the loss is not finite; lower the learning rate")
    network.load_state_dict(averaged.state_dict())
    network.eval()
    return mean


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
