"""The CNN-BiLSTM-attention backbone: convolutions, two bidirectional LSTM layers, self-attention, deep heads.

Has 50 times the parameters of the compact network, which is compared with it.
B = batch, T = window, C = 17 inputs, H = hidden width of each direction.
"""

import itertools

import torch
from torch import Tensor, nn

from model.contract import RUL_CAP
from model.training.backbones import WindowRows

CONVOLUTIONS = (64, 128, 64)
HEADS = 8
FEATURES = 32


def build_funnel(*widths: int, dropout: float) -> nn.Sequential:
    """Return linear layers of the given widths; ReLU and dropout follow every layer except the last."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(wide, narrow), *([nn.ReLU(), nn.Dropout(dropout)] if i < len(widths) - 2 else [])]
    return nn.Sequential(*layers)


class CnnBiLstmAttention(nn.Module):
    """CNN 64-128-64, BiLSTM of two layers, attention of eight heads with a residual, funnel 2H-H-H/4-32."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for channels, outputs in zip((inputs, *CONVOLUTIONS[:-1]), CONVOLUTIONS, strict=True):
            blocks += [nn.Conv1d(channels, outputs, 3, padding=1), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.local = nn.Sequential(*blocks)
        self.lstm = nn.LSTM(CONVOLUTIONS[-1], hidden, 2, batch_first=True, dropout=dropout, bidirectional=True)
        self.attention = nn.MultiheadAttention(2 * hidden, HEADS, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.funnel = build_funnel(2 * hidden, hidden, hidden // 4, FEATURES, dropout=dropout)

    def forward(self, rows: WindowRows) -> Tensor:  # (B, T, C) -> (B, 32)
        """Encode each window as one vector."""
        local = self.local(rows.normalised.transpose(1, 2)).transpose(1, 2)  # (B, T, 64)
        states, _ = self.lstm(local)  # (B, T, 2H)
        attended, _ = self.attention(states, states, states, need_weights=False)  # (B, T, 2H)
        features: Tensor = torch.relu(self.funnel(self.norm(states + attended).mean(1)))
        return features


class DeepHeads(nn.Module):
    """Two heads: 32-32-16-C for the classes, 32-64-32-16-1 for RUL."""

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.health = build_funnel(FEATURES, 32, 16, classes, dropout=dropout)
        self.remaining = build_funnel(FEATURES, 64, 32, 16, 1, dropout=dropout)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (B, 32) -> (B, classes), (B,)
        """Return logits and RUL, limited to 0..125 cycles."""
        return self.health(features), RUL_CAP * torch.sigmoid(self.remaining(features).squeeze(-1))
