"""The shipped network as it is served: time innermost, for a runtime that goes from node to node, in long steps.

`network` is written row by row, as one thinks of flights; a node of its graph works on three or fourteen numbers
at a time. Here each channel is one run of the window's length, a condition's statistics are picked by a product with
ones and zeros, and spells that stand still are found among booleans. Every number that the two layers see is a sum of
multiples of 2^-12, or a count, exact in float32 in any order: the answers have the same bits. The sum that tells
whether a row is of a condition alone is rounded; at a border its last bit decides, and there a plan proves itself.
B = batch, T = window, C = 17 channels, S = 14 sensors, K = operating conditions, N = spans.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.contract import SENSORS, SETTINGS
from model.training.backbones import STUCK, RollingMlp
from model.training.network import BROKEN, FAR, GRAIN, SAME_CONDITION, EngineHealth

EXACT = 2**24  # whole numbers up to here have a float32 of their own
MOST_GRAINS = BROKEN / GRAIN
APART = 2.01 * SAME_CONDITION  # scales; no row is of two conditions that are farther apart, however it is rounded
DOUBLED = (1, 2)  # steps that make STUCK neighbours of one: 1 + 1 + 2


def rolling(network: EngineHealth) -> RollingMlp:
    """The backbone of a network whose sums are exact, so that they may be taken in another order.

    Raises:
        ValueError: the network has another backbone, or a window whose sums may be rounded.
    """
    backbone, window = network.backbone, network.config.window
    if not isinstance(backbone, RollingMlp):
        raise ValueError(f"only rolling means may be taken in another order, not {network.config.backbone}")
    if not STUCK < window <= EXACT / MOST_GRAINS:
        raise ValueError(f"sums over {window} rows may be rounded")
    return backbone


class Plan(nn.Module):
    """A network of rolling means, channel by channel.

    Raises:
        ValueError: as `rolling` does, or a row can be of two conditions.
    """

    def __init__(self, network: EngineHealth) -> None:
        super().__init__()
        self.backbone, self.head, usual = rolling(network), network.head, network.normalise
        centres = usual.centres / usual.scales  # (K, 3)
        if len(centres) > 1 and torch.pdist(centres).min() <= APART:
            raise ValueError("two operating conditions are so near that a row can be of both")
        self.normalise = usual
        self.register_buffer("scales", usual.scales.unsqueeze(1))
        self.register_buffer("twice", 2 * centres)
        self.register_buffer("squares", centres.square().sum(1, keepdim=True))
        self.register_buffer("means", usual.means.T.contiguous())
        self.register_buffer("deviations", (usual.deviations * GRAIN).T.contiguous())

    def forward(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, classes), (B,)
        """Logits and RUL from raw physical readings."""
        channels = telemetry.transpose(1, 2).contiguous()
        settings, sensors = torch.split(channels, [len(SETTINGS), len(SENSORS)], dim=1)
        known, mine = self.alone(telemetry) if len(self.twice) == 1 else self.condition(settings)
        normal = (sensors - self.means @ mine) / (self.deviations @ mine)  # (B, S, T) in grains
        meant = normal.clamp(-MOST_GRAINS, MOST_GRAINS)
        differs = channels[:, :, 1:] != channels[:, :, :-1]  # (B, C, T - 1) from the row after it
        moved = differs.float().amax(1, keepdim=True).cumsum(2)  # 0 as long as all rows were the oldest
        real = F.pad(moved, (0, 1), value=1.0) > 0  # (B, 1, T)
        says = (meant == normal) & (known & real) & _fresh(differs[:, len(SETTINGS) :] | (moved == 0))
        said = says.float()
        sums, counts = (meant.round() * said) @ self.backbone.newest * GRAIN, said @ self.backbone.newest  # (B, S, N)
        described = self.backbone.described(sums, counts, real.float().sum(2))
        logits, rul, *_ = self.head(self.backbone.seen(described))
        return logits, rul

    def alone(self, telemetry: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, 1, T), (B, 1, T)
        """The same of a network of one condition, in its own words: products with one column are rounded otherwise."""
        known = self.normalise.nearest(telemetry[..., : len(SETTINGS)])[0].unsqueeze(1)
        return known, torch.ones_like(known).float()

    def condition(self, settings: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, T) -> (B, 1, T), (B, K, T)
        """Whether a row is of a condition that training saw, and 1 at that condition.

        Two conditions can be equally near only to a row that is of neither, of which nothing is said.
        """
        scaled = (settings / self.scales).clamp(-FAR, FAR)
        near = self.twice @ scaled - self.squares
        nearest = near.amax(1, keepdim=True)
        known = scaled.square().sum(1, keepdim=True) - nearest <= SAME_CONDITION**2
        return known, (near == nearest).float()

    scales: Tensor
    twice: Tensor
    squares: Tensor
    means: Tensor
    deviations: Tensor


def _fresh(differs: Tensor) -> Tensor:  # (B, S, T - 1) -> (B, S, T)
    """False where a reading is one of five or more equal ones in a row, and not their first."""
    for k in DOUBLED:
        differs = differs[:, :, k:] | differs[:, :, :-k]  # any of 2, any of STUCK
    fresh = F.pad(differs, (STUCK, STUCK - 1), value=True)
    for k in DOUBLED:
        fresh = fresh[:, :, k:] & fresh[:, :, :-k]
    return fresh
