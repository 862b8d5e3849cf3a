"""How far what is seen now is from what held-out engines looked like: no label needed. numpy only.

Both distances compare counts per bin with the shares of a reference. Rows of one engine resemble each other, so the
noise given here, which counts rows, is the least that there is.
"""

import numpy as np
import numpy.typing as npt

from model.contract import Histogram
from model.numerics import Floats

HALF_A_ROW = 0.5  # for each bin, added to the counts, spread as the reference is: an empty bin is rare, not impossible
RAREST = 1e-6  # a reference bin that held-out engines never filled counts as the last decimal of the manifest's shares
Distances = dict[str, float | int | None]


def counts_of(values: Floats, bins: Histogram) -> npt.NDArray[np.int64]:
    """How many values (N,) fall in each bin; a value on an edge belongs to the bin below it, as in the reference."""
    return np.bincount(np.searchsorted(bins.edges, values), minlength=len(bins.shares)).astype(np.int64)


def psi(shares: Floats, counts: Floats) -> float:
    """Population stability index Σ (q - p) ln (q / p), natural logarithm; q from the counts, p the reference.

    Smoothing: p is no less than `RAREST` (then scaled to 1), and q = (counts + m p) / (n + m), m half a row a bin, so
    that no logarithm is infinite and few rows are near the reference rather than far from it. n >= 1.
    """
    p = np.maximum(shares, RAREST)
    p /= p.sum()
    m = HALF_A_ROW * len(p)
    q = (counts + m * p) / (counts.sum() + m)
    return float(((q - p) * np.log(q / p)).sum())


def psi_noise(shares: Floats, n: float) -> float:
    """The mean of PSI over n rows without any drift: χ² of the filled bins over n, (bins - 1) / n."""
    return float(max(int(np.count_nonzero(shares)) - 1, 0) / n)


def jensen_shannon(shares: Floats, counts: Floats) -> float:
    """½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2, nats: from 0 to ln 2, whatever bins are empty. n >= 1."""
    p, q = shares / shares.sum(), counts / counts.sum()
    middle = np.where(p + q > 0, (p + q) / 2, 1.0)
    parts = (share * np.log(np.where(share > 0, share / middle, 1.0)) for share in (p, q))
    return float(max(sum(part.sum() for part in parts) / 2, 0.0))


def distances(reference: Histogram, counts: npt.ArrayLike, name: str) -> Distances:
    """PSI, its noise, Jensen-Shannon and n of one histogram; null without rows.

    Raises:
        ValueError: not one count >= 0 for each share of the reference; says of which histogram.
    """
    seen, shares = np.asarray(counts, dtype=np.float64), np.asarray(reference.shares)
    if seen.shape != shares.shape or not (np.isfinite(seen) & (seen >= 0)).all():
        raise ValueError(f"{name}: expected {len(shares)} counts >= 0, got shape {seen.shape}")
    n = seen.sum()
    if n == 0 or shares.sum() == 0:
        return {"psi": None, "noise": None, "jensen_shannon": None, "n": int(n)}
    return {
        "psi": psi(shares, seen),
        "noise": psi_noise(shares, n),
        "jensen_shannon": jensen_shannon(shares, seen),
        "n": int(n),
    }
