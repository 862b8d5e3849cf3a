"""The textbook backbone: convolutions, two bidirectional LSTM layers, self-attention, a funnel, deep heads.

Fifty times the parameters of the compact network; the anchor that the compact network is measured against.
B = batch, T = window, C = 17 inputs, H = hidden width of a direction.
"""

import itertools

import torch
from torch import Tensor, nn

from model.contract import RUL_CAP
from model.training.backbones import Rows

CONVOLUTIONS = (64, 128, 64)
HEADS = 8
FEATURES = 32


def funnel(*widths: int, dropout: float) -> nn.Sequential:
    """Linear layers through the widths, each but the last followed by ReLU and dropout."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(wide, narrow), *([nn.ReLU(), nn.Dropout(dropout)] if i < len(widths) - 2 else [])]
    return nn.Sequential(*layers)


class CnnBiLstmAttention(nn.Module):
    """CNN 64-128-64, BiLSTM of two layers, attention of eight heads with a residual, funnel 2H-H-H/4-32."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in zip((inputs, *CONVOLUTIONS[:-1]), CONVOLUTIONS, strict=True):
            blocks += [nn.Conv1d(before, after, 3, padding=1), nn.BatchNorm1d(after), nn.ReLU()]
        self.local = nn.Sequential(*blocks)
        self.lstm = nn.LSTM(CONVOLUTIONS[-1], hidden, 2, batch_first=True, dropout=dropout, bidirectional=True)
        self.attention = nn.MultiheadAttention(2 * hidden, HEADS, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.funnel = funnel(2 * hidden, hidden, hidden // 4, FEATURES, dropout=dropout)

    def forward(self, rows: Rows) -> Tensor:  # (B, T, C) -> (B, 32)
        """What the window shows, as one vector."""
        local = self.local(rows.normal.transpose(1, 2)).transpose(1, 2)  # (B, T, 64)
        states, _ = self.lstm(local)  # (B, T, 2H)
        attended, _ = self.attention(states, states, states, need_weights=False)  # (B, T, 2H)
        features: Tensor = torch.relu(self.funnel(self.norm(states + attended).mean(1)))
        return features


class DeepHeads(nn.Module):
    """Classes through 32-32-16-C, RUL through 32-64-32-16-1."""

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.health = funnel(FEATURES, 32, 16, classes, dropout=dropout)
        self.remaining = funnel(FEATURES, 64, 32, 16, 1, dropout=dropout)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (B, 32) -> (B, classes), (B,)
        """Logits, and RUL squeezed into 0..125."""
        return self.health(features), RUL_CAP * torch.sigmoid(self.remaining(features).squeeze(-1))
