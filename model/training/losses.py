"""The training losses: class weights, focal loss and the RUL loss, built on torch's losses. Independent of the network.

Functions return one loss per row. The caller reduces them with row weights, the frequencies in a live fleet.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.contract import RUL_CAP


def balanced_weights(counts: Tensor) -> Tensor:
    """Return class weights N / (C n_k), (C,), which balance the classes. They bias the posterior."""
    return counts.sum() / (len(counts) * counts.clamp(min=1))


def health_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, focal_gamma: float = 0.0
) -> Tensor:
    """Return -(1 - p_y)^γ w_y ln p_y per row, (B,): cross-entropy at γ = 0, focal loss above (Lin et al. 2017)."""
    loss = F.cross_entropy(logits, labels, reduction="none")  # (B,)
    focus = (1 - torch.exp(-loss)) ** focal_gamma if focal_gamma else 1.0
    weight = 1.0 if class_weights is None else class_weights[labels]
    return focus * weight * loss


def rul_loss(predicted: Tensor, true_rul: Tensor) -> Tensor:
    """Return the squared error (B,) against the capped RUL in units of the cap. Arguments are in cycles."""
    return ((predicted - true_rul.clamp(max=RUL_CAP)) / RUL_CAP) ** 2


def bin_loss(log_p: Tensor, true_rul: Tensor, edges: Tensor) -> Tensor:
    """Return -ln p (B,), in nats, of the bin of the true RUL under a distribution over RUL bins (B, R)."""
    return F.nll_loss(log_p, torch.bucketize(true_rul, edges), reduction="none")


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return Σ w l / Σ w, a scalar."""
    return (losses * weights).sum() / weights.sum()
