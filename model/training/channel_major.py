"""The channel-major form of the shipped network, which is served. Time is the innermost axis.

In the graph of `network`, nodes process 3 or 14 numbers at a time. Here they process a channel over the window,
which is faster. The statistics of a condition are selected by a product with ones and zeros. Frozen readings are
detected with booleans. All inputs of the two layers are counts or sums of multiples of 2^-12. They are exact in float32
in any order, so the outputs have the same bits.

Only the distance to a condition is rounded: its last bit decides at the border of a condition. Verification therefore
tests rows at such borders.
B = batch, T = window, C = 17 channels, S = 14 sensors, K = operating conditions, N = spans.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.contract import SENSORS, SETTINGS
from model.training.backbones import FROZEN_REPEATS, RollingMlp
from model.training.network import CONDITION_RADIUS, MAX_DEVIATION, MAX_SETTING_DISTANCE, QUANTUM, EngineHealth

MAX_EXACT_INTEGER = 2**24  # integers up to this value are exact in float32
MAX_QUANTA = MAX_DEVIATION / QUANTUM
MIN_CONDITION_DISTANCE = 2.01 * CONDITION_RADIUS  # scales; no row belongs to two conditions farther apart
DOUBLING_STEPS = (1, 2)  # steps that combine FROZEN_REPEATS neighbours: 1 + 1 + 2


def require_rolling_mlp(network: EngineHealth) -> RollingMlp:
    """Return the backbone of a network whose sums are exact in any order.

    Raises:
        ValueError: the network has another backbone, or its window is so long that sums may be rounded.
    """
    backbone, window = network.backbone, network.config.window
    if not isinstance(backbone, RollingMlp):
        raise ValueError(f"the backbone must be rolling-mlp to reorder sums, not {network.config.backbone}")
    if not FROZEN_REPEATS < window <= MAX_EXACT_INTEGER / MAX_QUANTA:
        raise ValueError(f"sums over {window} rows may be rounded")
    return backbone


class ChannelMajorNetwork(nn.Module):
    """The rolling-means network, computed channel by channel.

    Raises:
        ValueError: as `require_rolling_mlp`, or a row can belong to two conditions.
    """

    def __init__(self, network: EngineHealth) -> None:
        super().__init__()
        self.backbone, self.head, normaliser = require_rolling_mlp(network), network.head, network.normalise
        centres = normaliser.centres / normaliser.scales  # (K, 3)
        if len(centres) > 1 and torch.pdist(centres).min() <= MIN_CONDITION_DISTANCE:
            raise ValueError("two operating conditions are so close that a row can belong to both")
        self.normalise = normaliser
        self.register_buffer("scales", normaliser.scales.unsqueeze(1))
        self.register_buffer("twice", 2 * centres)
        self.register_buffer("squares", centres.square().sum(1, keepdim=True))
        self.register_buffer("means", normaliser.means.T.contiguous())
        self.register_buffer("deviations", (normaliser.deviations * QUANTUM).T.contiguous())

    def forward(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, classes), (B,)
        """Compute logits and RUL from raw readings in physical units."""
        channels = telemetry.transpose(1, 2).contiguous()
        settings, sensors = torch.split(channels, [len(SETTINGS), len(SENSORS)], dim=1)
        is_known, one_hot = (
            self.single_condition(telemetry) if len(self.twice) == 1 else self.one_hot_condition(settings)
        )
        scaled = (sensors - self.means @ one_hot) / (self.deviations @ one_hot)  # (B, S, T) in quanta
        clamped = scaled.clamp(-MAX_QUANTA, MAX_QUANTA)
        differs = channels[:, :, 1:] != channels[:, :, :-1]  # (B, C, T - 1) from the next row
        changes = differs.float().amax(1, keepdim=True).cumsum(2)  # 0 in leading copies of the oldest row
        observed = F.pad(changes, (0, 1), value=1.0) > 0  # (B, 1, T)
        is_valid = (
            (clamped == scaled) & (is_known & observed) & _not_frozen(differs[:, len(SETTINGS) :] | (changes == 0))
        )
        valid = is_valid.float()
        sums = (clamped.round() * valid) @ self.backbone.newest * QUANTUM  # (B, S, N)
        counts = valid @ self.backbone.newest  # (B, S, N)
        features = self.backbone.features_from_sums(sums, counts, observed.float().sum(2))
        logits, rul, *_ = self.head(self.backbone.apply_layers(features))
        return logits, rul

    def single_condition(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, 1, T), (B, 1, T)
        """Do the same for one condition, as `Normaliser` does: products with one column round differently."""
        is_known = self.normalise.nearest_condition(telemetry[..., : len(SETTINGS)])[0].unsqueeze(1)
        return is_known, torch.ones_like(is_known).float()

    def one_hot_condition(self, settings: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, T) -> (B, 1, T), (B, K, T)
        """Return whether each row is of a known condition, and a one-hot condition.

        Only a row of an unknown condition can be equally close to two conditions. Its readings are invalid.
        """
        scaled = (settings / self.scales).clamp(-MAX_SETTING_DISTANCE, MAX_SETTING_DISTANCE)
        similarity = self.twice @ scaled - self.squares
        largest = similarity.amax(1, keepdim=True)
        is_known = scaled.square().sum(1, keepdim=True) - largest <= CONDITION_RADIUS**2
        return is_known, (similarity == largest).float()

    scales: Tensor
    twice: Tensor
    squares: Tensor
    means: Tensor
    deviations: Tensor


def _not_frozen(differs: Tensor) -> Tensor:  # (B, S, T - 1) -> (B, S, T)
    """Return False where a reading belongs to a run of five or more equal ones and is not the first of them."""
    for k in DOUBLING_STEPS:
        differs = differs[:, :, k:] | differs[:, :, :-k]  # any of 2, then any of FROZEN_REPEATS
    not_frozen = F.pad(differs, (FROZEN_REPEATS, FROZEN_REPEATS - 1), value=True)
    for k in DOUBLING_STEPS:
        not_frozen = not_frozen[:, :, k:] & not_frozen[:, :, :-k]
    return not_frozen
