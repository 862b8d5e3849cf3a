"""The shipped network over whole histories: what overlapping windows share is worked out once, to the same bits.

A window of 100 rows and the next one have 99 in common. Here each row is normalised once, and sums over the newest rows
are put together from shorter ones. They are sums of multiples of 2^-12 and of counts, exact in float32 in any order, so
that nothing of an answer depends on how it came about. What a window alone decides (padding, readings that stand still
across its ends) is found out; such a window is named, and is to be answered alone.
M = rows, N = windows, C = 17 channels, S = 14 sensors.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.contract import SETTINGS
from model.training.backbones import STUCK
from model.training.channel_major import rolling
from model.training.network import EngineHealth


class Histories(nn.Module):
    """A network of rolling means, reading rows of many engines one behind another.

    Raises:
        ValueError: as `model.training.channel_major.rolling` does.
    """

    def __init__(self, network: EngineHealth) -> None:
        super().__init__()
        self.backbone, self.window = rolling(network), network.config.window
        self.normalise, self.head = network.normalise, network.head

    def forward(self, telemetry: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Answers (N, classes) and (N,) of the windows of rows (M, C) that begin at `starts` (N,), and which hold (N,).

        Where the last is false, the answer is not that of the window.
        """
        ends = starts + self.window - 1
        normal, meant = self.normalise.scaled(telemetry)
        copied = _repeats((telemetry[1:] == telemetry[:-1]).all(1, keepdim=True))  # (M, 1) of the row after it
        same = _repeats(telemetry[1:, len(SETTINGS) :] == telemetry[:-1, len(SETTINGS) :]) * (1 - copied)  # (M, S)
        run = reduce(torch.mul, [_older(same, k) for k in range(STUCK)])  # 1 where the STUCK-th repetition ends
        held = _older(torch.stack([_newer(run, k) for k in range(STUCK)]).amax(0), 1)
        says = meant * (1 - held) * (1 - copied)
        begun = copied * (1 - _older(copied, 1))  # copies that are no padding, unless a window begins with them
        sums = _sums(torch.cat([normal * says, says, 1 - copied, begun], dim=1), self.backbone.spans)
        both = torch.stack([part[ends] for part in sums], dim=-1)  # (N, 2 S + 2, spans)
        alone = (
            (held[starts].sum(1) > 0)  # held since before the window
            | ((held - _older(run, 1))[ends].sum(1) > 0)  # held for long enough only after it
            | (copied[ends] > 0).squeeze(1)
            | (both[:, -1, -1] > begun[starts].squeeze(1))
        )
        totals, counts = both[:, :-2].chunk(2, dim=1)
        described = self.backbone.described(totals, counts, both[:, -2, -1:].clamp(min=1))
        logits, rul, *_ = self.head(self.backbone.seen(described))
        return logits, rul, ~alone


def _repeats(same: Tensor) -> Tensor:  # (M - 1, ...) -> (M, ...)
    """1 where the next row is the same; after the last row there is none."""
    return F.pad(same.float(), (0, 0, 0, 1))


def _older(x: Tensor, k: int) -> Tensor:  # (M, ...) -> (M, ...)
    """What stood k rows before, 0 before the first."""
    return F.pad(x, (0, 0, k, -k))


def _newer(x: Tensor, k: int) -> Tensor:  # (M, ...) -> (M, ...)
    """What stands k rows later, 0 after the last."""
    return F.pad(x, (0, 0, -k, k))


def _sums(x: Tensor, spans: Sequence[int]) -> list[Tensor]:  # (M, ...) -> (M, ...) for each span
    """Sums over the newest 1, 3, 5 ... rows, each of the longest ones before it that fit one behind another."""
    sums = {1: x}
    for span in spans:
        if span not in sums:
            parts, taken = [], 0
            while taken < span:
                longest = max(length for length in sums if length <= span - taken)
                parts.append(_older(sums[longest], taken))
                taken += longest
            sums[span] = reduce(torch.add, parts)
    return [sums[span] for span in spans]
