"""The compact backbones: a perceptron on rolling means (shipped), and a convolution followed by a GRU.

Each maps normalised sensors and their validity to one vector. Independent of channels, training and files.
B = batch, T = window, S = sensors, N = spans, H = hidden width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPANS = (1, 3, 5, 10, 20, 40)  # newest rows that a mean is taken over; the whole window is always added
FROZEN_REPEATS = 4  # repetitions after which a reading counts as frozen


class WindowRows(NamedTuple):
    """A batch of windows, the input of a backbone."""

    normalised: Tensor  # (B, T, S) standard deviations, 0 if out of range
    valid: Tensor  # (B, T, S) 1 where a reading counts, else 0
    observed: Tensor  # (B, T) 1 where a row was observed, 0 where it is padding


def observed_rows(telemetry: Tensor) -> Tensor:  # (B, T, C) -> (B, T)
    """Return 1 where a row was observed, 0 where it is padding: a copy of the oldest row in front of it.

    Of the equal rows at the start, the newest is the observed one. All rows of a window may be equal.
    """
    differs = (telemetry != telemetry[:, :1]).any(-1)
    past_padding = differs.float().cumsum(1) > 0
    return torch.cat([past_padding[:, 1:], torch.ones_like(past_padding[:, :1])], dim=1).float()


def frozen_readings(sensors: Tensor, observed: Tensor) -> Tensor:  # (B, T, S), (B, T) -> (B, T, S)
    """Return 1 where a reading belongs to a run of five or more equal ones and is not the first of them.

    Under one operating condition, this holds for 4 % of the rows of the coarsest C-MAPSS sensor, which reports
    integers. For every other sensor it holds for less than 0.1 % of the rows.
    """
    equal = (sensors[:, 1:] == sensors[:, :-1]).float() * observed[:, :-1, None]  # (B, T - 1, S)
    equal = F.pad(equal.transpose(1, 2), (FROZEN_REPEATS, FROZEN_REPEATS - 1))
    frozen_starts = -F.max_pool1d(-equal, FROZEN_REPEATS, 1)  # 1 where FROZEN_REPEATS begin
    return F.max_pool1d(frozen_starts, FROZEN_REPEATS, 1).transpose(1, 2)


class RollingMlp(nn.Module):
    """Two layers on the means of each sensor over the newest 1, 3, 5 ... rows, and on the amount of data.

    Wear is slow and noise is fast, so means over several spans contain what a recurrent layer would have to learn.
    Invalid readings do not count. A span without valid readings takes the mean of the next longer span.
    """

    def __init__(self, window: int, sensors: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.spans = [*(span for span in SPANS if span < window), window]
        newest = torch.arange(window, 0, -1).unsqueeze(1) <= torch.tensor(self.spans)  # (T, N)
        self.register_buffer("newest", newest.float())
        # A lookup table, because the rounding of ONNX Runtime's logarithm depends on the position in the batch.
        lengths = 2 * torch.log(torch.arange(window + 1) + 1.0) / math.log(window + 1) - 1
        self.register_buffer("lengths", lengths, persistent=False)
        self.register_buffer("places", torch.arange(len(self.spans)), persistent=False)
        self.first = nn.Linear(sensors * len(self.spans) + 2, hidden)
        self.second = nn.Linear(hidden, hidden // 2)
        self.dropout = nn.Dropout(dropout)
        self.width = hidden // 2

    def features(self, rows: WindowRows) -> Tensor:  # (B, T, S) -> (B, S N + 2)
        """Return means of each span (0 without valid readings), the history length (log, -1..1) and the valid share."""
        normalised, valid, observed = rows
        totals = torch.cat([normalised * valid, valid], dim=2).transpose(1, 2) @ self.newest  # (B, 2 S, N)
        sums, counts = totals.chunk(2, dim=1)
        return self.features_from_sums(sums, counts, observed.sum(1, keepdim=True))

    def features_from_sums(self, sums: Tensor, counts: Tensor, length: Tensor) -> Tensor:  # (B, S, N) twice, (B, 1)
        """Compute the features from sums and counts of valid readings per span, and the number of rows, at least 1."""
        means = sums / counts.clamp(min=1)
        # Spans are nested: empty spans come first, and the next one is the shortest span that has a mean.
        shortest = (counts[:, :, :-1] == 0).sum(-1, keepdim=True)
        means = means.gather(-1, torch.maximum(shortest, self.places)).transpose(1, 2).flatten(1)
        share = counts[:, :, -1].mean(1, keepdim=True) / length
        return torch.cat([means, self.lengths[length.long()], 2 * share - 1], dim=1)

    def forward(self, rows: WindowRows) -> Tensor:  # (B, T, S) -> (B, H / 2)
        """Encode each window as one vector."""
        return self.apply_layers(self.features(rows))

    def apply_layers(self, features: Tensor) -> Tensor:  # (B, S N + 2) -> (B, H / 2)
        """Apply the two layers to the features."""
        return F.relu(self.second(self.dropout(F.relu(self.first(features)))))

    newest: Tensor
    lengths: Tensor
    places: Tensor


class ConvGru(nn.Module):
    """A strided convolution over neighbouring cycles, followed by a GRU. The output is its last state."""

    def __init__(self, sensors: int, hidden: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(sensors, hidden, kernel, stride)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.width = hidden

    def forward(self, rows: WindowRows) -> Tensor:  # (B, T, S) -> (B, H)
        """Encode each window as one vector. Padding counts as rows that repeat the oldest one."""
        convolved = F.relu(self.conv(rows.normalised.transpose(1, 2))).transpose(
            1, 2
        )  # (B, (T - kernel) / stride + 1, H)
        states, _ = self.gru(convolved)
        last: Tensor = states[:, -1]
        return last
