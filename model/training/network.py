"""The network: raw telemetry in, class logits and remaining useful life out. Normalisation lives inside it.

Knows the contract's channels and nothing of training, files or serving.
B = batch, T = window, C = 17 channels, S = 14 sensors, K = operating conditions, H = hidden width.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.contract import CHANNELS, RUL_CAP, RUL_THRESHOLDS, SENSORS, SETTINGS
from model.training.backbones import ConvGru, RollingMlp, Rows, real_rows, stuck
from model.training.cnn_bilstm import CnnBiLstmAttention, DeepHeads
from model.windows import Readings

# How far apart two settings must be to be another operating condition: kft of altitude, Mach, degrees of throttle.
# The six conditions of C-MAPSS are 3 to 10 of these apart, and its noise within one is under a hundredth.
SETTING_SCALES = (2.5, 0.1, 10.0)
SETTINGS_SPAN = 17.0  # of those scales from the lowest flight to the highest, so that settings enter as 0..1
Backbone = Literal["rolling-mlp", "conv-gru", "cnn-bilstm-attention"]
SAME_CONDITION = 0.5  # scales; farther from every centre is a condition that training never saw
FAR = 1e4  # scales; settings beyond any flight are as far as this, so that nothing overflows
BROKEN = 10.0  # deviations; wear reaches five
GRAIN = 2.0**-12  # deviations; sums of multiples of it are exact in float32, in whatever order they are taken


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that the shape of the network depends on; it travels in the checkpoint and in the manifest."""

    window: int = 100
    conditions: int = 6
    thresholds: tuple[float, ...] = RUL_THRESHOLDS
    backbone: Backbone = "rolling-mlp"
    head: Literal["distribution", "separate"] = "distribution"  # the textbook backbone brings its own, separate ones
    hidden: int = 320
    kernel: int = 6  # of conv-gru, as is the stride
    stride: int = 2
    dropout: float = 0.1
    bin_cycles: int = 5  # width of a bin of the RUL distribution; thresholds must be multiples of it

    @property
    def classes(self) -> int:
        """One class more than thresholds."""
        return len(self.thresholds) + 1


class Answer(NamedTuple):
    """What the heads say: logits (B, classes), RUL (B,) in cycles, and the log-probability of each RUL bin if there."""

    logits: Tensor
    rul: Tensor
    bins: Tensor | None = None  # (B, R)


class Normaliser(nn.Module):
    """Assigns each row to its nearest operating condition and scales its sensors by that condition's statistics."""

    def __init__(self, conditions: int, with_settings: bool = False) -> None:
        super().__init__()
        self.with_settings = with_settings
        self.register_buffer("scales", torch.tensor(SETTING_SCALES))
        self.register_buffer("centres", torch.zeros(conditions, len(SETTINGS)))
        self.register_buffer("means", torch.zeros(conditions, len(SENSORS)))
        self.register_buffer("deviations", torch.ones(conditions, len(SENSORS)))

    def forward(self, telemetry: Tensor) -> Rows:  # (B, T, C) -> (B, T, S) or (B, T, C), (B, T, S), (B, T)
        """Sensors in deviations from what is usual in their operating condition, and which of them count.

        Nothing is said, and stands as zero, in padding, in a row of a condition that training never saw, by a sensor
        beyond ten deviations (broken, not worn) and by one that stands still. With settings, they stand before the
        sensors, scaled.
        """
        normal, meant = self.scaled(telemetry)
        real = real_rows(telemetry)
        says = meant * (1 - stuck(telemetry[..., len(SETTINGS) :], real)) * real.unsqueeze(-1)
        if self.with_settings:
            settings = (telemetry[..., : len(SETTINGS)] / self.scales).clamp(-FAR, FAR)
            normal = torch.cat([(settings / SETTINGS_SPAN).clamp(-1, 1), normal], dim=-1)
        return Rows(normal, says, real)

    def scaled(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., S), (..., S)
        """Sensors in deviations, to the grain, and which are meant: no row looks at another.

        What is not meant stands as zero. The noise of a sensor is one deviation, four thousand times the grain.
        """
        known, condition = self.nearest(telemetry[..., : len(SETTINGS)])
        sensors = telemetry[..., len(SETTINGS) :]
        normal = (sensors - self.means[condition]) / (self.deviations[condition] * GRAIN)  # a power of two: exact
        meant = (normal.abs() <= BROKEN / GRAIN) & known.unsqueeze(-1)
        # Padding and held readings stay for the backbones that look at rows and not at what they say.
        return torch.where(meant, normal.round(), 0.0) * GRAIN, meant

    def nearest(self, settings: Tensor) -> tuple[Tensor, Tensor]:  # (..., 3) -> (...), (...)
        """Whether a row is of a condition that training saw, and the place of the one that is nearest."""
        settings = (settings / self.scales).clamp(-FAR, FAR)
        centres = self.centres / self.scales  # (K, 3)
        # nearest centre: |s - c|² = |s|² - 2 (s c - |c|²/2), and |s|² is the same for all
        near, condition = (settings @ centres.T - centres.square().sum(-1) / 2).max(-1)
        return settings.square().sum(-1) - 2 * near <= SAME_CONDITION**2, condition

    def fit(self, rows: Readings) -> None:
        """Statistics per condition from training rows (N, C).

        Raises:
            ValueError: the rows do not hold as many conditions as this module was built for.
        """
        centres, condition = find_conditions(rows[:, : len(SETTINGS)])
        if len(centres) != len(self.centres):
            raise ValueError(f"found {len(centres)} operating conditions, built for {len(self.centres)}")
        sensors = rows[:, len(SETTINGS) :].astype(np.float64)
        groups = [sensors[condition == k] for k in range(len(centres))]
        means, deviations = (
            np.stack([statistic(group, axis=0) for group in groups]) for statistic in (np.mean, np.std)
        )
        # A channel that is constant in a condition says nothing there: any change counts in thousandths of its size.
        constant = deviations <= 1e-6 * np.abs(means)
        self.centres.copy_(torch.from_numpy(centres))
        self.means.copy_(torch.from_numpy(means))
        self.deviations.copy_(torch.from_numpy(np.where(constant, 1e-3 * np.maximum(np.abs(means), 1.0), deviations)))

    scales: Tensor
    centres: Tensor
    means: Tensor
    deviations: Tensor


def find_conditions(settings: Readings) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Centres (K, 3) of the operating conditions in settings (N, 3), and the condition of each row (N,).

    Farthest-point traversal until every row is within one scale of a centre, then one mean: K is found, not given.
    """
    points = settings.astype(np.float64) / SETTING_SCALES
    picked = [points[0]]
    distance = np.linalg.norm(points - picked[0], axis=1)
    while distance.max() > 1:
        picked.append(points[distance.argmax()])
        distance = np.minimum(distance, np.linalg.norm(points - picked[-1], axis=1))
    condition = np.linalg.norm(points[:, None] - np.array(picked), axis=2).argmin(axis=1)
    centres = np.stack([settings[condition == k].mean(axis=0, dtype=np.float64) for k in range(len(picked))])
    order = np.lexsort(centres.T[::-1])
    return centres[order], np.argsort(order)[condition]


class SeparateHeads(nn.Module):
    """One layer for the classes, one for RUL; nothing keeps them from contradicting each other."""

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        self.health = nn.Linear(width, config.classes)
        self.remaining = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Answer:  # (B, H) -> (B, classes), (B,)
        """Logits, and RUL squeezed into 0..125."""
        return Answer(self.health(features), RUL_CAP * torch.sigmoid(self.remaining(features).squeeze(-1)))


class DistributionHead(nn.Module):
    """One distribution over RUL: its mass in the bins of a class gives the logits, its mean the RUL.

    Bins are (0, 5], (5, 10], ..., (120, 125] and more than 125 cycles. Classes are runs of bins, so that the two
    answers cannot contradict each other, and the thresholds are chosen at export without training anew.
    """

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        if any(t % config.bin_cycles or not 0 < t <= RUL_CAP for t in config.thresholds):
            raise ValueError(f"thresholds must be multiples of {config.bin_cycles} up to {RUL_CAP:g} cycles")
        edges = bin_edges(config)
        self.bins = nn.Linear(width, len(edges) + 1)
        self.register_buffer("centres", torch.cat([edges - config.bin_cycles / 2, torch.tensor([RUL_CAP])]))
        ends = [0, *sorted(int(t) // config.bin_cycles for t in config.thresholds), len(edges) + 1]
        self.runs = [slice(*pair) for pair in pairwise(ends)][::-1]  # class 0 is the healthiest

    def forward(self, features: Tensor) -> Answer:  # (B, H) -> (B, classes), (B,), (B, R)
        """Log-mass of each class about their mean, mean RUL, log-mass of each bin."""
        log_p = F.log_softmax(self.bins(features), dim=-1)  # (B, R)
        mass = self.classes_of(log_p)
        # Softmax is blind to the shift, float32 is not: near zero the rounding of an unlikely class is smaller.
        return Answer(mass - mass.mean(-1, keepdim=True), self.mean_of(log_p.exp()), log_p)

    def classes_of(self, log_p: Tensor) -> Tensor:  # (B, R) -> (B, classes)
        """Log-mass of each class."""
        return torch.cat([log_p[:, run].logsumexp(-1, keepdim=True) for run in self.runs], dim=-1)

    def mean_of(self, p: Tensor) -> Tensor:  # (B, R) -> (B,)
        """Mean RUL in cycles; more than 125 counts as 125.

        A product of matrices, whose rows ONNX Runtime adds up in one order; a sum's depends on the place in the batch.
        """
        return p @ self.centres

    centres: Tensor


def bin_edges(config: NetworkConfig) -> Tensor:
    """Upper ends of the closed RUL bins, in cycles; the last bin is open."""
    return torch.arange(config.bin_cycles, RUL_CAP + 1, config.bin_cycles)


class EngineHealth(nn.Module):
    """Normaliser, backbone and heads: logits, never probabilities, and RUL in cycles, 0..125."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        textbook = config.backbone == "cnn-bilstm-attention"
        self.normalise = Normaliser(config.conditions, with_settings=textbook)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone: CnnBiLstmAttention | ConvGru | RollingMlp
        self.head: nn.Module
        if textbook:
            self.backbone = CnnBiLstmAttention(len(CHANNELS), config.hidden, config.dropout)
            self.head = DeepHeads(config.classes, config.dropout)
        else:
            if config.backbone == "rolling-mlp":
                self.backbone = RollingMlp(config.window, len(SENSORS), config.hidden, config.dropout)
            else:
                self.backbone = ConvGru(len(SENSORS), config.hidden, config.kernel, config.stride)
            head = DistributionHead if config.head == "distribution" else SeparateHeads
            self.head = head(config, self.backbone.width)

    def heads(self, rows: Rows) -> Answer:  # (B, T, S) -> (B, classes), (B,), (B, R)
        """All answers from normalised sensors; training calls this directly to disturb them first."""
        return Answer(*self.head(self.dropout(self.backbone(rows))))

    def forward(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, classes), (B,)
        """Logits and RUL from raw physical readings."""
        answer = self.heads(self.normalise(telemetry))
        return answer.logits, answer.rul
