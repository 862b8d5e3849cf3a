"""The network: maps raw telemetry to class logits and remaining useful life (RUL). Normalisation is a part of it.

Depends on the contract's channels; independent of training, files and serving.
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
from model.training.backbones import ConvGru, RollingMlp, WindowRows, frozen_readings, observed_rows
from model.training.cnn_bilstm import CnnBiLstmAttention, DeepHeads
from model.windows import Readings

# Distance at which two settings belong to different operating conditions: kft of altitude, Mach, degrees of throttle.
# The six conditions of C-MAPSS are 3 to 10 of these scales apart; the noise within one condition is below 0.01.
SETTING_SCALES = (2.5, 0.1, 10.0)
SETTINGS_SPAN = 17.0  # scales, from the lowest flight to the highest; maps settings to 0..1
Backbone = Literal["rolling-mlp", "conv-gru", "cnn-bilstm-attention"]
CONDITION_RADIUS = 0.5  # scales; rows farther from every centre are of a condition that is not in the training data
MAX_SETTING_DISTANCE = 1e4  # scales; settings are clamped to this distance, which avoids overflow
MAX_DEVIATION = 10.0  # standard deviations; a reading beyond is of a broken sensor, wear reaches 5
QUANTUM = 2.0**-12  # standard deviations; sums of its multiples are exact in float32 in any order


@dataclass(frozen=True)
class NetworkConfig:
    """Parameters that determine the shape of the network. They are stored in the checkpoint."""

    window: int = 100
    conditions: int = 6
    thresholds: tuple[float, ...] = RUL_THRESHOLDS
    backbone: Backbone = "rolling-mlp"
    head: Literal["distribution", "separate"] = "distribution"  # cnn-bilstm-attention always has separate heads
    hidden: int = 320
    kernel: int = 6  # of conv-gru, as is the stride
    stride: int = 2
    dropout: float = 0.1
    bin_cycles: int = 5  # width of a bin of the RUL distribution; thresholds must be multiples of it

    @property
    def classes(self) -> int:
        """Number of classes: one more than thresholds."""
        return len(self.thresholds) + 1


class NetworkOutput(NamedTuple):
    """Output of the heads: logits (B, classes), RUL (B,) in cycles, and log-probabilities of RUL bins if available."""

    logits: Tensor
    rul: Tensor
    bins: Tensor | None = None  # (B, R)


class Normaliser(nn.Module):
    """Assign rows to their nearest operating condition and standardise sensors with its statistics."""

    def __init__(self, conditions: int, with_settings: bool = False) -> None:
        super().__init__()
        self.with_settings = with_settings
        self.register_buffer("scales", torch.tensor(SETTING_SCALES))
        self.register_buffer("centres", torch.zeros(conditions, len(SETTINGS)))
        self.register_buffer("means", torch.zeros(conditions, len(SENSORS)))
        self.register_buffer("deviations", torch.ones(conditions, len(SENSORS)))

    def forward(self, telemetry: Tensor) -> WindowRows:  # (B, T, C) -> (B, T, S) or (B, T, C), (B, T, S), (B, T)
        """Return standardised sensors and which readings are valid.

        A reading is invalid in padding, in a row of an unknown operating condition, beyond 10 standard deviations
        (broken, not worn) and where the sensor is frozen. Readings that are out of range are set to zero. If
        `with_settings` is true, scaled settings precede the sensors.
        """
        normalised, in_range = self.standardise(telemetry)
        observed = observed_rows(telemetry)
        valid = in_range * (1 - frozen_readings(telemetry[..., len(SETTINGS) :], observed)) * observed.unsqueeze(-1)
        if self.with_settings:
            settings = (telemetry[..., : len(SETTINGS)] / self.scales).clamp(
                -MAX_SETTING_DISTANCE, MAX_SETTING_DISTANCE
            )
            normalised = torch.cat([(settings / SETTINGS_SPAN).clamp(-1, 1), normalised], dim=-1)
        return WindowRows(normalised, valid, observed)

    def standardise(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., S), (..., S)
        """Return sensors in standard deviations, rounded to multiples of `QUANTUM`, and which are in range.

        Each row is independent of the others. Readings out of range are zero. Sensor noise is one standard deviation,
        4096 quanta.
        """
        is_known, condition = self.nearest_condition(telemetry[..., : len(SETTINGS)])
        sensors = telemetry[..., len(SETTINGS) :]
        normalised = (sensors - self.means[condition]) / (self.deviations[condition] * QUANTUM)  # exact: a power of two
        in_range = (normalised.abs() <= MAX_DEVIATION / QUANTUM) & is_known.unsqueeze(-1)
        # Padding and frozen readings keep their values: some backbones ignore `valid`.
        return torch.where(in_range, normalised.round(), 0.0) * QUANTUM, in_range

    def nearest_condition(self, settings: Tensor) -> tuple[Tensor, Tensor]:  # (..., 3) -> (...), (...)
        """Return whether each row is of a known operating condition, and the index of the nearest condition."""
        settings = (settings / self.scales).clamp(-MAX_SETTING_DISTANCE, MAX_SETTING_DISTANCE)
        centres = self.centres / self.scales  # (K, 3)
        # nearest centre: |s - c|² = |s|² - 2 (s c - |c|²/2), and |s|² is the same for all
        similarity, condition = (settings @ centres.T - centres.square().sum(-1) / 2).max(-1)
        return settings.square().sum(-1) - 2 * similarity <= CONDITION_RADIUS**2, condition

    def fit(self, rows: Readings) -> None:
        """Estimate the statistics of each condition from training rows (N, C).

        Raises:
            ValueError: the rows contain another number of conditions than this module was built for.
        """
        centres, condition = find_conditions(rows[:, : len(SETTINGS)])
        if len(centres) != len(self.centres):
            raise ValueError(f"found {len(centres)} operating conditions, built for {len(self.centres)}")
        sensors = rows[:, len(SETTINGS) :].astype(np.float64)
        groups = [sensors[condition == k] for k in range(len(centres))]
        means, deviations = (
            np.stack([statistic(group, axis=0) for group in groups]) for statistic in (np.mean, np.std)
        )
        # The standard deviation of a channel that is constant in a condition is set to 0.001 of its size.
        constant = deviations <= 1e-6 * np.abs(means)
        self.centres.copy_(torch.from_numpy(centres))
        self.means.copy_(torch.from_numpy(means))
        self.deviations.copy_(torch.from_numpy(np.where(constant, 1e-3 * np.maximum(np.abs(means), 1.0), deviations)))

    scales: Tensor
    centres: Tensor
    means: Tensor
    deviations: Tensor


def find_conditions(settings: Readings) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the centres (K, 3) of the operating conditions in settings (N, 3), and the condition of each row (N,).

    Farthest-point traversal runs until every row is within one scale of a centre. Centres are then the means of their
    rows. K follows from the data.
    """
    points = settings.astype(np.float64) / SETTING_SCALES
    seeds = [points[0]]
    distance = np.linalg.norm(points - seeds[0], axis=1)
    while distance.max() > 1:
        seeds.append(points[distance.argmax()])
        distance = np.minimum(distance, np.linalg.norm(points - seeds[-1], axis=1))
    condition = np.linalg.norm(points[:, None] - np.array(seeds), axis=2).argmin(axis=1)
    centres = np.stack([settings[condition == k].mean(axis=0, dtype=np.float64) for k in range(len(seeds))])
    order = np.lexsort(centres.T[::-1])
    return centres[order], np.argsort(order)[condition]


class SeparateHeads(nn.Module):
    """One layer for the classes and one for RUL. Their outputs may contradict each other."""

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        self.health = nn.Linear(width, config.classes)
        self.remaining = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> NetworkOutput:  # (B, H) -> (B, classes), (B,)
        """Return logits and RUL, limited to 0..125 cycles."""
        return NetworkOutput(self.health(features), RUL_CAP * torch.sigmoid(self.remaining(features).squeeze(-1)))


class DistributionHead(nn.Module):
    """One distribution over RUL: its mass in the bins of a class gives the logits, its mean gives the RUL.

    Bins are (0, 5], (5, 10], ..., (120, 125] and more than 125 cycles. Classes are contiguous bins, so classes and
    RUL are consistent, and thresholds can be changed at export without training.
    """

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        if any(t % config.bin_cycles or not 0 < t <= RUL_CAP for t in config.thresholds):
            raise ValueError(f"thresholds must be multiples of {config.bin_cycles} up to {RUL_CAP:g} cycles")
        edges = bin_edges(config)
        self.bins = nn.Linear(width, len(edges) + 1)
        self.register_buffer("centres", torch.cat([edges - config.bin_cycles / 2, torch.tensor([RUL_CAP])]))
        boundaries = [0, *sorted(int(t) // config.bin_cycles for t in config.thresholds), len(edges) + 1]
        self.class_slices = [slice(*pair) for pair in pairwise(boundaries)][::-1]  # class 0 has the highest RUL

    def forward(self, features: Tensor) -> NetworkOutput:  # (B, H) -> (B, classes), (B,), (B, R)
        """Return centred log-masses of classes, mean RUL and log-masses of bins."""
        log_p = F.log_softmax(self.bins(features), dim=-1)  # (B, R)
        mass = self.class_log_mass(log_p)
        # Softmax is invariant to this shift; float32 rounding errors are smaller near zero.
        return NetworkOutput(mass - mass.mean(-1, keepdim=True), self.mean_rul(log_p.exp()), log_p)

    def class_log_mass(self, log_p: Tensor) -> Tensor:  # (B, R) -> (B, classes)
        """Return the log-mass of each class."""
        return torch.cat([log_p[:, bins].logsumexp(-1, keepdim=True) for bins in self.class_slices], dim=-1)

    def mean_rul(self, p: Tensor) -> Tensor:  # (B, R) -> (B,)
        """Return the mean RUL in cycles; the open bin counts as 125 cycles.

        Uses a matrix product: ONNX Runtime sums its rows in a fixed order, while the order of a reduction depends on
        the position in the batch.
        """
        return p @ self.centres

    centres: Tensor


def bin_edges(config: NetworkConfig) -> Tensor:
    """Return the upper edges of the closed RUL bins in cycles. The last bin is open."""
    return torch.arange(config.bin_cycles, RUL_CAP + 1, config.bin_cycles)


class EngineHealth(nn.Module):
    """Normaliser, backbone and heads. Outputs are logits, never probabilities, and RUL in cycles, 0..125."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        is_cnn_bilstm = config.backbone == "cnn-bilstm-attention"
        self.normalise = Normaliser(config.conditions, with_settings=is_cnn_bilstm)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone: CnnBiLstmAttention | ConvGru | RollingMlp
        self.head: nn.Module
        if is_cnn_bilstm:
            self.backbone = CnnBiLstmAttention(len(CHANNELS), config.hidden, config.dropout)
            self.head = DeepHeads(config.classes, config.dropout)
        else:
            if config.backbone == "rolling-mlp":
                self.backbone = RollingMlp(config.window, len(SENSORS), config.hidden, config.dropout)
            else:
                self.backbone = ConvGru(len(SENSORS), config.hidden, config.kernel, config.stride)
            head = DistributionHead if config.head == "distribution" else SeparateHeads
            self.head = head(config, self.backbone.width)

    def predict_rows(self, rows: WindowRows) -> NetworkOutput:  # (B, T, S) -> (B, classes), (B,), (B, R)
        """Compute all outputs from normalised rows. Training calls this method after augmentation of the rows."""
        return NetworkOutput(*self.head(self.dropout(self.backbone(rows))))

    def forward(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, classes), (B,)
        """Compute logits and RUL from raw readings in physical units."""
        output = self.predict_rows(self.normalise(telemetry))
        return output.logits, output.rul
