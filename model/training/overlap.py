"""The overlap form of the shipped network: computes what overlapping windows share once, with the same output bits.

A window of 100 rows and the next one have 99 rows in common. Here each row is normalised once, and sums over the newest
rows are combined from shorter sums. They are counts or sums of multiples of 2^-12, exact in float32 in any order.

Padding, and readings that are frozen across the edges of a window, depend on the window alone. Such windows are
reported as not exact and must be run individually.
M = rows, N = windows, C = 17 channels, S = 14 sensors.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.contract import SETTINGS
from model.training.backbones import FROZEN_REPEATS
from model.training.channel_major import require_rolling_mlp
from model.training.network import EngineHealth


class OverlapNetwork(nn.Module):
    """The rolling-means network on concatenated rows of many engines.

    Raises:
        ValueError: as `model.training.channel_major.require_rolling_mlp`.
    """

    def __init__(self, network: EngineHealth) -> None:
        super().__init__()
        self.backbone, self.window = require_rolling_mlp(network), network.config.window
        self.normalise, self.head = network.normalise, network.head

    def forward(self, telemetry: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits (N, classes), RUL (N,) and exactness (N,) of windows.

        Windows begin at `starts` (N,) of the rows (M, C). Where exactness is False, logits and RUL are not those of
        the window.
        """
        ends = starts + self.window - 1
        normalised, in_range = self.normalise.standardise(telemetry)
        copied = _append_zero_row(
            (telemetry[1:] == telemetry[:-1]).all(1, keepdim=True)
        )  # (M, 1), the next row is equal
        equal = _append_zero_row(telemetry[1:, len(SETTINGS) :] == telemetry[:-1, len(SETTINGS) :]) * (
            1 - copied
        )  # (M, S)
        # 1 at the end of FROZEN_REPEATS repetitions
        frozen_ends = reduce(torch.mul, [_shift_later(equal, k) for k in range(FROZEN_REPEATS)])
        frozen = _shift_later(torch.stack([_shift_earlier(frozen_ends, k) for k in range(FROZEN_REPEATS)]).amax(0), 1)
        valid = in_range * (1 - frozen) * (1 - copied)
        first_copies = copied * (
            1 - _shift_later(copied, 1)
        )  # copies that are padding only if a window begins with them
        sums = _span_sums(torch.cat([normalised * valid, valid, 1 - copied, first_copies], dim=1), self.backbone.spans)
        spans = torch.stack([part[ends] for part in sums], dim=-1)  # (N, 2 S + 2, spans)
        inexact = (
            (frozen[starts].sum(1) > 0)  # frozen since before the window
            | ((frozen - _shift_later(frozen_ends, 1))[ends].sum(1) > 0)  # frozen only with later rows
            | (copied[ends] > 0).squeeze(1)
            | (spans[:, -1, -1] > first_copies[starts].squeeze(1))
        )
        totals, counts = spans[:, :-2].chunk(2, dim=1)
        features = self.backbone.features_from_sums(totals, counts, spans[:, -2, -1:].clamp(min=1))
        logits, rul, *_ = self.head(self.backbone.apply_layers(features))
        return logits, rul, ~inexact


def _append_zero_row(equal: Tensor) -> Tensor:  # (M - 1, ...) -> (M, ...)
    """Return 1 where the next row is equal, with 0 appended for the last row."""
    return F.pad(equal.float(), (0, 0, 0, 1))


def _shift_later(x: Tensor, k: int) -> Tensor:  # (M, ...) -> (M, ...)
    """Shift by k rows towards later rows, filling with 0."""
    return F.pad(x, (0, 0, k, -k))


def _shift_earlier(x: Tensor, k: int) -> Tensor:  # (M, ...) -> (M, ...)
    """Shift by k rows towards earlier rows, filling with 0."""
    return F.pad(x, (0, 0, -k, k))


def _span_sums(x: Tensor, spans: Sequence[int]) -> list[Tensor]:  # (M, ...) -> (M, ...) for each span
    """Return sums over the newest 1, 3, 5 ... rows. Each is combined from the longest shorter sums that fit."""
    sums = {1: x}
    for span in spans:
        if span not in sums:
            parts, taken = [], 0
            while taken < span:
                longest = max(length for length in sums if length <= span - taken)
                parts.append(_shift_later(sums[longest], taken))
                taken += longest
            sums[span] = reduce(torch.add, parts)
    return [sums[span] for span in spans]
