"""Distances of current values from a reference of held-out engines, without labels. numpy only.

Both distances compare counts per bin with the shares of a reference. Rows of one engine are correlated, so the noise
returned here, which assumes independent rows, is a lower bound.
"""

import numpy as np
import numpy.typing as npt

from model.contract import Histogram
from model.numerics import Floats

SMOOTHING_ROWS_PER_BIN = 0.5  # rows per bin, added to the counts with the shares of the reference
MIN_REFERENCE_SHARE = 1e-6  # the last decimal of the manifest's shares, used for empty reference bins
Distances = dict[str, float | int | None]


def count_bins(values: Floats, bins: Histogram) -> npt.NDArray[np.int64]:
    """Count values (N,) per bin. A value on an edge belongs to the lower bin, as in the reference."""
    return np.bincount(np.searchsorted(bins.edges, values), minlength=len(bins.shares)).astype(np.int64)


def psi(shares: Floats, counts: Floats) -> float:
    """Return the population stability index Σ (q - p) ln (q / p); q is from the counts, p is the reference.

    Smoothing: p is at least `MIN_REFERENCE_SHARE` (then scaled to sum 1), and q = (counts + m p) / (n + m), where m is
    half a row per bin. Logarithms are then finite, and few rows give a small distance. n >= 1.
    """
    p = np.maximum(shares, MIN_REFERENCE_SHARE)
    p /= p.sum()
    m = SMOOTHING_ROWS_PER_BIN * len(p)
    q = (counts + m * p) / (counts.sum() + m)
    return float(((q - p) * np.log(q / p)).sum())


def psi_noise(shares: Floats, n: float) -> float:
    """Return the expected PSI of n rows without drift: χ² of the filled bins over n, (bins - 1) / n."""
    return float(max(int(np.count_nonzero(shares)) - 1, 0) / n)


def jensen_shannon(shares: Floats, counts: Floats) -> float:
    """Return ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2, in nats, 0..ln 2. Bins may be empty. n >= 1."""
    p, q = shares / shares.sum(), counts / counts.sum()
    middle = np.where(p + q > 0, (p + q) / 2, 1.0)
    parts = (share * np.log(np.where(share > 0, share / middle, 1.0)) for share in (p, q))
    return float(max(sum(part.sum() for part in parts) / 2, 0.0))


def distances(reference: Histogram, counts: npt.ArrayLike, name: str) -> Distances:
    """Return PSI, its noise, Jensen-Shannon and n of one histogram; null without rows.

    Raises:
        ValueError: `counts` has not one count >= 0 per share of the reference. The message contains `name`.
    """
    bin_counts, shares = np.asarray(counts, dtype=np.float64), np.asarray(reference.shares)
    if bin_counts.shape != shares.shape or not (np.isfinite(bin_counts) & (bin_counts >= 0)).all():
        raise ValueError(f"{name}: expected {len(shares)} counts >= 0, got shape {bin_counts.shape}")
    n = bin_counts.sum()
    if n == 0 or shares.sum() == 0:
        return {"psi": None, "noise": None, "jensen_shannon": None, "n": int(n)}
    return {
        "psi": psi(shares, bin_counts),
        "noise": psi_noise(shares, n),
        "jensen_shannon": jensen_shannon(shares, bin_counts),
        "n": int(n),
    }
