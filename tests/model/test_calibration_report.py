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
    """Return a small set of rows that includes certainty, impossibility, ties, soft labels and empty bins."""
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
    """Compute the same metrics with plain loops over Python floats."""
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
    predicted = [max(range(classes), key=lambda k, row=row: row[k]) for row in z.tolist()]  # type: ignore[misc]  # mypy does not infer the default
    bins: dict[int, float] = defaultdict(float)
    for i in range(n):
        bins[bin_of(max(p[i]))] += max(p[i]) - q[i][predicted[i]]
    sums: dict[int, float] = defaultdict(float)
    sizes: dict[int, int] = defaultdict(int)
    for i in range(n):
        sums[engine[i]] += gap[i]
        sizes[engine[i]] += 1
    mean_gap, e = sum(gap) / n, len(sums)
    spread = sum((sums[k] - sizes[k] * mean_gap) ** 2 for k in sums) * e / max(e - 1, 1)
    metrics = {
        "realised": sum(loss) / n,
        "expected": sum(expected) / n,
        "z": sum(gap) / math.sqrt(sum(variance)) if sum(variance) > 0 else math.nan,
        "z_engines": sum(gap) / math.sqrt(spread) if e > 1 and spread > 0 else math.nan,
        "brier": sum((p[i][k] - q[i][k]) ** 2 for i in range(n) for k in range(classes)) / n,
        "accuracy": sum(q[i][predicted[i]] for i in range(n)) / n,
        "ece": sum(abs(x) for x in bins.values()) / n,
        "T²": sum(gap) ** 2,
        "rows": sum(x * x + 2 * v for x, v in zip(gap, variance, strict=True)) / 3,
        "squares": sum(x * x for x in sums.values()),
    }
    for k in range(classes):
        class_gaps: dict[int, float] = defaultdict(float)
        for i in range(n):
            class_gaps[bin_of(p[i][k])] += p[i][k] - q[i][k]
        hits = sum(q[i][k] for i in range(n) if predicted[i] == k)
        true, predictions = sum(q[i][k] for i in range(n)), sum(c == k for c in predicted)
        metrics[f"ece of {k}"] = sum(abs(x) for x in class_gaps.values()) / n
        metrics[f"recall of {k}"] = hits / true if true > 0 else math.nan
        metrics[f"precision of {k}"] = hits / predictions if predictions else math.nan
    return metrics


def bin_of(p: float) -> int:
    """Return k of the bin (k/15, (k+1)/15]; zero belongs to the first bin."""
    return next(k for k in range(15) if p <= (k + 1) / 15 or k == 14)


def report_metrics(z: np.ndarray, q: np.ndarray, engine: np.ndarray) -> dict[str, float]:
    rows = measure_rows(z, q, engine)
    losses, deviations = cross_entropy_section(rows), of_losses(rows.z, rows.loss, rows.entropy, rows.variance)
    flat = {name: losses[name] for name in ("realised", "expected", "z", "z_engines")} | {
        "brier": float(numerics.brier(z, q).mean()),
        "accuracy": float(rows.correct.mean()),
        "ece": numerics.ece(rows.z, rows.q),
        "T²": evidence(deviations, rows.engines).total ** 2,
        "rows": float((deviations.x**2 + 2 * deviations.variance).sum() / 3),
        "squares": float((rows.engines.sum_rows(deviations.x) ** 2).sum()),
    }
    for k in range(z.shape[1]):
        section = class_section(rows, k, str(k))
        flat |= {f"{name} of {k}": section[name] for name in ("ece", "recall", "precision")}
    return flat


def test_report_equals_plain_loops() -> None:
    """Each metric of 10,000 small random sets equals an independent reference to 1e-9, edge cases included."""
    for seed in range(SETS):
        drawn = random_set(seed)
        expected, result = reference(*drawn), report_metrics(*drawn)
        assert expected.keys() == result.keys()
        values = np.array([list(expected.values()), list(result.values())])
        assert np.allclose(values[0], values[1], rtol=1e-9, atol=1e-9, equal_nan=True), (seed, expected, result)


def random_rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.normal(0, 2, (20_000, 3)), random.integers(0, 3, 20_000)


def test_report_agrees_with_torchmetrics_and_torch() -> None:
    """ECE of 15 bins, accuracy and cross-entropy equal those of torchmetrics and torch on 20,000 rows."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    z, y = random_rows()
    report = report_sections(measure_rows(z, y, np.arange(len(y))), ("a", "b", "c"))
    p, true = torch.softmax(torch.tensor(z), 1), torch.tensor(y)
    assert float(MulticlassCalibrationError(3, n_bins=15, norm="l1")(p, true)) == pytest.approx(
        report["ece"]["value"], abs=1e-6
    )
    assert float(MulticlassAccuracy(3, average="micro")(p, true)) == pytest.approx(report["accuracy"], abs=1e-6)
    loss = float(torch.nn.functional.cross_entropy(torch.tensor(z), true))
    assert loss == pytest.approx(report["cross_entropy"]["realised"], abs=1e-9)
    assert float(((p - torch.eye(3)[true]) ** 2).sum(1).mean()) == pytest.approx(report["brier"], abs=1e-9)


def test_ece_agrees_with_netcal() -> None:
    """ECE of 15 bins equals that of netcal on a large set and on 100 small ones with empty bins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages that netcal imports
        from netcal.metrics import ECE

    z, y = random_rows()
    for rows in (slice(None), *(slice(20 * k, 20 * k + 20) for k in range(100))):
        theirs = ECE(bins=15).measure(numerics.softmax(z[rows]), y[rows])
        assert float(theirs) == pytest.approx(numerics.ece(z[rows], y[rows]), abs=1e-9)


def test_z_engines_equals_resampled_z() -> None:
    """`z_engines` equals the gap divided by its spread over 10,000 resamples of engines, within 2 %."""
    random = np.random.default_rng(0)
    engine = random.integers(0, 60, 4000)
    z = random.normal(0, 2, (4000, 3)) + random.normal(0, 1, (60, 3))[engine]
    rows = measure_rows(z, random.integers(0, 3, 4000), engine)
    x = rows.loss - rows.entropy
    sums, sizes = np.bincount(engine, x), np.bincount(engine)
    drawn = random.integers(0, 60, (10_000, 60))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert x.mean() / means.std() == pytest.approx(
        report_sections(rows, ("a", "b", "c"))["cross_entropy"]["z_engines"], rel=0.02
    )


def test_repeated_rows_of_an_engine_leave_its_interval() -> None:
    """Repeating every row under the same engine changes neither the metrics nor the interval by engines."""
    random = np.random.default_rng(1)
    z, y, engine = random.normal(0, 2, (600, 3)), random.integers(0, 3, 600), random.integers(0, 60, 600)
    once = report_sections(measure_rows(z, y, engine), ("a", "b", "c"))
    thrice = report_sections(measure_rows(np.tile(z, (3, 1)), np.tile(y, 3), np.tile(engine, 3)), ("a", "b", "c"))
    for name in ("realised", "expected", "z_engines"):
        assert once["cross_entropy"][name] == pytest.approx(thrice["cross_entropy"][name])
    assert once["cross_entropy"]["interval"] == pytest.approx(thrice["cross_entropy"]["interval"])
    assert once["ece"]["interval"] == pytest.approx(thrice["ece"]["interval"])
    assert math.sqrt(3) * once["cross_entropy"]["z"] == pytest.approx(thrice["cross_entropy"]["z"])


def test_noise_band_of_many_rows_equals_simulated_band() -> None:
    """Above the limit of simulated rows, the noise band is equal within its own noise."""
    z, _ = random_rows()
    simulated, normal = (numerics.ece_noise_band(z, draws=2000, coins=coins) for coins in (10**6, 10))
    assert simulated == pytest.approx(normal, rel=0.05)
