"""The compact backbones: rolling means under a small perceptron (shipped), and one convolution under one GRU.

Each takes normalised sensors and which rows count, and answers one vector. Knows no channels, training or files.
B = batch, T = window, S = sensors, N = spans, H = hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPANS = (1, 3, 5, 10, 20, 40)  # newest rows that a mean is taken over; the whole window is always one more


def real_rows(telemetry: Tensor) -> Tensor:  # (B, T, C) -> (B, T)
    """1 where a row was read, 0 where it is a copy of the oldest one that padding put before it.

    The newest of the equal rows at the start is the one that was read. A window may be all one row.
    """
    differs = (telemetry != telemetry[:, :1]).any(-1)
    past_padding = differs.float().cumsum(1) > 0
    return torch.cat([past_padding[:, 1:], torch.ones_like(past_padding[:, :1])], dim=1).float()


class RollingMlp(nn.Module):
    """Each sensor's means over the newest 1, 3, 5 ... rows and the number of rows, through two layers.

    Wear is slow and noise is not: means over several spans keep what a recurrent layer has to learn. Padding and rows
    of unknown operating conditions do not count, so that a short history gives the mean of what it has.
    """

    def __init__(self, window: int, sensors: int, hidden: int, dropout: float) -> None:
        super().__init__()
        spans = [*(span for span in SPANS if span < window), window]
        newest = torch.arange(window, 0, -1).unsqueeze(1) <= torch.tensor(spans)  # (T, N)
        self.register_buffer("newest", newest.float())
        self.first = nn.Linear(sensors * len(spans) + 1, hidden)
        self.second = nn.Linear(hidden, hidden // 2)
        self.dropout = nn.Dropout(dropout)
        self.width = hidden // 2

    def features(self, x: Tensor, real: Tensor) -> Tensor:  # (B, T, S), (B, T) -> (B, S N + 1)
        """Mean over the rows of each span that count, 0 if none does; how much of the window counts, -1..1."""
        sums = (x * real.unsqueeze(-1)).transpose(1, 2) @ self.newest  # (B, S, N)
        counts = real @ self.newest  # (B, N)
        means = sums / counts.unsqueeze(1).clamp(min=1)
        length = 2 * counts[:, -1:] / x.shape[1] - 1  # (B, 1)
        return torch.cat([means.flatten(1), length], dim=1)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:  # (B, T, S), (B, T) -> (B, H / 2)
        """What the window shows, as one vector."""
        return F.relu(self.second(self.dropout(F.relu(self.first(self.features(x, real))))))

    newest: Tensor


class ConvGru(nn.Module):
    """One strided convolution that combines neighbouring cycles, one GRU that follows them; its last state."""

    def __init__(self, sensors: int, hidden: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(sensors, hidden, kernel, stride)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.width = hidden

    def forward(self, x: Tensor, _real: Tensor) -> Tensor:  # (B, T, S) -> (B, H)
        """What the window shows, as one vector; padding is read as if the engine had stood still."""
        local = F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)  # (B, (T - kernel) / stride + 1, H)
        states, _ = self.gru(local)
        last: Tensor = states[:, -1]
        return last
