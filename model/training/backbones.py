"""The compact backbones: rolling means under a small perceptron (shipped), and one convolution under one GRU.

Each takes normalised sensors and which readings count, and answers one vector. Knows no channels, training or files.
B = batch, T = window, S = sensors, N = spans, H = hidden width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPANS = (1, 3, 5, 10, 20, 40)  # newest rows that a mean is taken over; the whole window is always one more
STUCK = 4  # repetitions of a reading that show it to be held


class Rows(NamedTuple):
    """Windows as a backbone sees them."""

    normal: Tensor  # (B, T, S) deviations from what is usual, 0 where nothing is said
    says: Tensor  # (B, T, S) 1 where a reading counts
    real: Tensor  # (B, T) 1 where a row was read, 0 where it is padding


def real_rows(telemetry: Tensor) -> Tensor:  # (B, T, C) -> (B, T)
    """1 where a row was read, 0 where it is a copy of the oldest one that padding put before it.

    The newest of the equal rows at the start is the one that was read. A window may be all one row.
    """
    differs = (telemetry != telemetry[:, :1]).any(-1)
    past_padding = differs.float().cumsum(1) > 0
    return torch.cat([past_padding[:, 1:], torch.ones_like(past_padding[:, :1])], dim=1).float()


def stuck(sensors: Tensor, real: Tensor) -> Tensor:  # (B, T, S), (B, T) -> (B, T, S)
    """1 where a reading is one of five or more equal ones in a row, and not their first: held, not measured.

    The coarsest sensor of C-MAPSS, whole numbers, does so in 4 % of its rows under one operating condition; no other
    does in more than one row of a thousand.
    """
    same = (sensors[:, 1:] == sensors[:, :-1]).float() * real[:, :-1, None]  # (B, T - 1, S)
    same = F.pad(same.transpose(1, 2), (STUCK, STUCK - 1))
    runs = -F.max_pool1d(-same, STUCK, 1)  # 1 where STUCK repetitions begin
    return F.max_pool1d(runs, STUCK, 1).transpose(1, 2)


class RollingMlp(nn.Module):
    """Each sensor's means over the newest 1, 3, 5 ... rows, and how much there is to go by, through two layers.

    Wear is slow and noise is not: means over several spans keep what a recurrent layer has to learn. A reading that
    says nothing does not count; a span without any takes the mean of the next longer one.
    """

    def __init__(self, window: int, sensors: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.spans = [*(span for span in SPANS if span < window), window]
        newest = torch.arange(window, 0, -1).unsqueeze(1) <= torch.tensor(self.spans)  # (T, N)
        self.register_buffer("newest", newest.float())
        # A table: ONNX Runtime's logarithm rounds by the place in the batch, and a length is one of a few.
        lengths = 2 * torch.log(torch.arange(window + 1) + 1.0) / math.log(window + 1) - 1
        self.register_buffer("lengths", lengths, persistent=False)
        self.register_buffer("places", torch.arange(len(self.spans)), persistent=False)
        self.first = nn.Linear(sensors * len(self.spans) + 2, hidden)
        self.second = nn.Linear(hidden, hidden // 2)
        self.dropout = nn.Dropout(dropout)
        self.width = hidden // 2

    def features(self, rows: Rows) -> Tensor:  # (B, T, S) -> (B, S N + 2)
        """Means of each span, 0 where a sensor says nothing; the length of the history (log, -1..1); the share said."""
        x, says, real = rows
        both = torch.cat([x * says, says], dim=2).transpose(1, 2) @ self.newest  # (B, 2 S, N)
        sums, counts = both.chunk(2, dim=1)
        return self.described(sums, counts, real.sum(1, keepdim=True))

    def described(self, sums: Tensor, counts: Tensor, length: Tensor) -> Tensor:  # (B, S, N) twice, (B, 1)
        """The same from sums of what is said over each span, how many readings those are, and rows, which are not 0."""
        means = sums / counts.clamp(min=1)
        # Spans are nested: the empty ones come first, and the one after them is the shortest that has a mean.
        shortest = (counts[:, :, :-1] == 0).sum(-1, keepdim=True)
        means = means.gather(-1, torch.maximum(shortest, self.places)).transpose(1, 2).flatten(1)
        share = counts[:, :, -1].mean(1, keepdim=True) / length
        return torch.cat([means, self.lengths[length.long()], 2 * share - 1], dim=1)

    def forward(self, rows: Rows) -> Tensor:  # (B, T, S) -> (B, H / 2)
        """What the window shows, as one vector."""
        return self.seen(self.features(rows))

    def seen(self, features: Tensor) -> Tensor:  # (B, S N + 2) -> (B, H / 2)
        """The two layers."""
        return F.relu(self.second(self.dropout(F.relu(self.first(features)))))

    newest: Tensor
    lengths: Tensor
    places: Tensor


class ConvGru(nn.Module):
    """One strided convolution that combines neighbouring cycles, one GRU that follows them; its last state."""

    def __init__(self, sensors: int, hidden: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(sensors, hidden, kernel, stride)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.width = hidden

    def forward(self, rows: Rows) -> Tensor:  # (B, T, S) -> (B, H)
        """What the window shows, as one vector; padding is read as if the engine had stood still."""
        local = F.relu(self.conv(rows.normal.transpose(1, 2))).transpose(1, 2)  # (B, (T - kernel) / stride + 1, H)
        states, _ = self.gru(local)
        last: Tensor = states[:, -1]
        return last
