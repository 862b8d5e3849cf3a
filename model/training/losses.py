"""The training losses: class weights, focal loss and the RUL loss, thin over torch's own. Knows no network.

Losses are per row and reduced with row weights by the caller: a row counts as often as a live fleet would show it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.contract import RUL_CAP


def balanced_weights(counts: Tensor) -> Tensor:
    """Class weights N / (C n_k), (C,): every class weighs the same. They shift the posterior off the data's."""
    return counts.sum() / (len(counts) * counts.clamp(min=1))


def health_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, focal_gamma: float = 0.0
) -> Tensor:
    """-(1 - p_y)^γ w_y ln p_y a row, (B,): cross-entropy at γ = 0, focal loss above it (Lin et al. 2017)."""
    loss = F.cross_entropy(logits, labels, reduction="none")  # (B,)
    focus = (1 - torch.exp(-loss)) ** focal_gamma if focal_gamma else 1.0
    weight = 1.0 if class_weights is None else class_weights[labels]
    return focus * weight * loss


def rul_loss(predicted: Tensor, true_rul: Tensor) -> Tensor:
    """Squared error against the capped RUL in units of the cap, (B,): both in cycles."""
    return ((predicted - true_rul.clamp(max=RUL_CAP)) / RUL_CAP) ** 2


def bin_loss(log_p: Tensor, true_rul: Tensor, edges: Tensor) -> Tensor:
    """-ln of the probability (B,) that a distribution over RUL bins (B, R) gives to the bin of the truth; nats."""
    return F.nll_loss(log_p, torch.bucketize(true_rul, edges), reduction="none")


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Σ w l / Σ w, a scalar."""
    return (losses * weights).sum() / weights.sum()
