import math
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch

from model import numerics
from model.evaluation.calibration_report import class_section, cross_entropy_section, measure_rows, report_sections
from model.evaluation.sequential import evidence, of_losses

SETS = 10_000


def random_set(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A small set of rows, with certainty, impossibility, ties, soft labels and empty bins among them."""
    random = np.random.default_rng(seed)
    rows, classes = int(random.integers(1, 9)), int(random.integers(1, 5))
    z = random.normal(0, random.choice([0.1, 2, 30, 2000]), (rows, classes))
    if seed % 7 == 0:
        z = np.round(z)
    q = (
        random.dirichlet(np.ones(classes), rows)
        if seed % 5 == 0
        else np.eye(classes)[random.integers(0, classes, rows)]
    )
    return z, q, random.integers(0, 4, rows)


def reference(z: np.ndarray, q: np.ndarray, engine: np.ndarray) -> dict[str, float]:
    """The same figures by plain loops in Python's floats."""
    n, classes = z.shape
    p, log_p = [], []
    for row in z.tolist():
        m = max(row)
        total = math.log(sum(math.exp(x - m) for x in row))
        log_p.append([x - m - total for x in row])
        p.append([math.exp(x) for x in log_p[-1]])
    loss = [-sum(q[i][k] * log_p[i][k] for k in range(classes)) for i in range(n)]
    expected = [-sum(p[i][k] * log_p[i][k] for k in range(classes)) for i in range(n)]
    variance = [max(sum(p[i][k] * log_p[i][k] ** 2 for k in range(classes)) - expected[i] ** 2, 0.0) for i in range(n)]
    gap = [a - b for a, b in zip(loss, expected, strict=True)]
    called = [max(range(classes), key=lambda k, row=row: row[k]) for row in z.tolist()]  # type: ignore[misc]  # mypy reads no default
    bins: dict[int, float] = defaultdict(float)
    for i in range(n):
        bins[bin_of(max(p[i]))] += max(p[i]) - q[i][called[i]]
    sums: dict[int, float] = defaultdict(float)
    sizes: dict[int, int] = defaultdict(int)
    for i in range(n):
        sums[engine[i]] += gap[i]
        sizes[engine[i]] += 1
    mean_gap, e = sum(gap) / n, len(sums)
    spread = sum((sums[k] - sizes[k] * mean_gap) ** 2 for k in sums) * e / max(e - 1, 1)
    found = {
        "realised": sum(loss) / n,
        "expected": sum(expected) / n,
        "z": sum(gap) / math.sqrt(sum(variance)) if sum(variance) > 0 else math.nan,
        "z_engines": sum(gap) / math.sqrt(spread) if e > 1 and spread > 0 else math.nan,
        "brier": sum((p[i][k] - q[i][k]) ** 2 for i in range(n) for k in range(classes)) / n,
        "accuracy": sum(q[i][called[i]] for i in range(n)) / n,
        "ece": sum(abs(x) for x in bins.values()) / n,
        "T²": sum(gap) ** 2,
        "rows": sum(x * x + 2 * v for x, v in zip(gap, variance, strict=True)) / 3,
        "squares": sum(x * x for x in sums.values()),
    }
    for k in range(classes):
        of_class: dict[int, float] = defaultdict(float)
        for i in range(n):
            of_class[bin_of(p[i][k])] += p[i][k] - q[i][k]
        hits = sum(q[i][k] for i in range(n) if called[i] == k)
        true, calls = sum(q[i][k] for i in range(n)), sum(c == k for c in called)
        found[f"ece of {k}"] = sum(abs(x) for x in of_class.values()) / n
        found[f"recall of {k}"] = hits / true if true > 0 else math.nan
        found[f"precision of {k}"] = hits / calls if calls else math.nan
    return found


def bin_of(p: float) -> int:
    """The k of (k/15, (k+1)/15], zero in the first."""
    return next(k for k in range(15) if p <= (k + 1) / 15 or k == 14)


def ours(z: np.ndarray, q: np.ndarray, engine: np.ndarray) -> dict[str, float]:
    found = measure_rows(z, q, engine)
    losses, seen = cross_entropy_section(found), of_losses(found.z, found.loss, found.entropy, found.variance)
    flat = {name: losses[name] for name in ("realised", "expected", "z", "z_engines")} | {
        "brier": float(numerics.brier(z, q).mean()),
        "accuracy": float(found.correct.mean()),
        "ece": numerics.ece(found.z, found.q),
        "T²": evidence(seen, found.engines).total ** 2,
        "rows": float((seen.x**2 + 2 * seen.variance).sum() / 3),
        "squares": float((found.engines.sum_rows(seen.x) ** 2).sum()),
    }
    for k in range(z.shape[1]):
        one = class_section(found, k, str(k))
        flat |= {f"{name} of {k}": one[name] for name in ("ece", "recall", "precision")}
    return flat


def test_every_figure_is_what_plain_loops_find() -> None:
    """On 10,000 small random sets each figure agrees with an independent reference to 1e-9, edges among them."""
    for seed in range(SETS):
        drawn = random_set(seed)
        one, other = reference(*drawn), ours(*drawn)
        assert one.keys() == other.keys()
        values = np.array([list(one.values()), list(other.values())])
        assert np.allclose(values[0], values[1], rtol=1e-9, atol=1e-9, equal_nan=True), (seed, one, other)


def many() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.normal(0, 2, (20_000, 3)), random.integers(0, 3, 20_000)


def test_figures_agree_with_torchmetrics_and_torch() -> None:
    """ECE of 15 bins, accuracy and cross-entropy are torchmetrics' and torch's on 20,000 rows."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    z, y = many()
    said = report_sections(measure_rows(z, y, np.arange(len(y))), ("a", "b", "c"))
    p, true = torch.softmax(torch.tensor(z), 1), torch.tensor(y)
    assert float(MulticlassCalibrationError(3, n_bins=15, norm="l1")(p, true)) == pytest.approx(
        said["ece"]["value"], abs=1e-6
    )
    assert float(MulticlassAccuracy(3, average="micro")(p, true)) == pytest.approx(said["accuracy"], abs=1e-6)
    loss = float(torch.nn.functional.cross_entropy(torch.tensor(z), true))
    assert loss == pytest.approx(said["cross_entropy"]["realised"], abs=1e-9)
    assert float(((p - torch.eye(3)[true]) ** 2).sum(1).mean()) == pytest.approx(said["brier"], abs=1e-9)


def test_ece_agrees_with_netcal() -> None:
    """ECE of 15 bins is netcal's, on a large set and on a hundred small ones with bins that nothing falls in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports on the way is not ours to mend
        from netcal.metrics import ECE

    z, y = many()
    for rows in (slice(None), *(slice(20 * k, 20 * k + 20) for k in range(100))):
        theirs = ECE(bins=15).measure(numerics.softmax(z[rows]), y[rows])
        assert float(theirs) == pytest.approx(numerics.ece(z[rows], y[rows]), abs=1e-9)


def test_z_of_engines_is_what_resampling_them_gives() -> None:
    """The gap over its spread when engines are drawn anew, ten thousand times, is z_engines within two per cent."""
    random = np.random.default_rng(0)
    engine = random.integers(0, 60, 4000)
    z = random.normal(0, 2, (4000, 3)) + random.normal(0, 1, (60, 3))[engine]
    found = measure_rows(z, random.integers(0, 3, 4000), engine)
    x = found.loss - found.entropy
    sums, sizes = np.bincount(engine, x), np.bincount(engine)
    drawn = random.integers(0, 60, (10_000, 60))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert x.mean() / means.std() == pytest.approx(
        report_sections(found, ("a", "b", "c"))["cross_entropy"]["z_engines"], rel=0.02
    )


def test_windows_of_one_engine_widen_the_interval() -> None:
    """Every row three times, under the same engine, changes neither the figures nor the engines' interval."""
    random = np.random.default_rng(1)
    z, y, engine = random.normal(0, 2, (600, 3)), random.integers(0, 3, 600), random.integers(0, 60, 600)
    once = report_sections(measure_rows(z, y, engine), ("a", "b", "c"))
    thrice = report_sections(measure_rows(np.tile(z, (3, 1)), np.tile(y, 3), np.tile(engine, 3)), ("a", "b", "c"))
    for name in ("realised", "expected", "z_engines"):
        assert once["cross_entropy"][name] == pytest.approx(thrice["cross_entropy"][name])
    assert once["cross_entropy"]["interval"] == pytest.approx(thrice["cross_entropy"]["interval"])
    assert once["ece"]["interval"] == pytest.approx(thrice["ece"]["interval"])
    assert math.sqrt(3) * once["cross_entropy"]["z"] == pytest.approx(thrice["cross_entropy"]["z"])


def test_the_noise_band_of_many_rows_is_that_of_coins() -> None:
    """Beyond the rows whose coins are tossed, the band is the same within its own noise."""
    z, _ = many()
    tossed, normal = (numerics.ece_noise_band(z, draws=2000, coins=coins) for coins in (10**6, 10))
    assert tossed == pytest.approx(normal, rel=0.05)
