import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.streams import Stream, fleet, independent
from model import numerics
from model.evaluation.cluster_bootstrap import group_by_engine
from model.evaluation.reliability import class_ece, decompose_brier, ece_interval, equal_mass_ece


def test_equal_mass_ece_of_an_example() -> None:
    """Four rows in two bins of two have errors of 0.1 and 0.4 per bin."""
    confidence, correct = np.array([0.9, 0.6, 0.8, 0.7]), np.array([1.0, 0, 1, 1])
    assert (abs(0.6 + 0.7 - 1) + abs(0.8 + 0.9 - 2)) / 4 == pytest.approx(equal_mass_ece(confidence, correct, 2))


def test_equal_mass_ece_ignores_row_order() -> None:
    """Rows of equal confidence are in one bin, so their order has no effect."""
    correct = np.arange(40) % 2
    assert 0.3 == pytest.approx(equal_mass_ece(np.full(40, 0.8), correct.astype(float)))
    assert 0.3 == pytest.approx(equal_mass_ece(np.full(40, 0.8), np.sort(correct).astype(float)))
    assert 0.0 == equal_mass_ece(np.array([]), np.array([]))


def test_equal_mass_bins_differ_by_one_row() -> None:
    """The sizes of bins with distinct confidences differ by at most one row."""
    confidence = np.random.default_rng(0).permutation(np.linspace(0.5, 1, 100))
    correct = np.where(confidence > np.sort(confidence)[-8], 1.0, confidence)
    assert (1 - np.sort(confidence)[-7:]).sum() / 100 == pytest.approx(equal_mass_ece(confidence, correct))


def test_class_ece_of_an_example() -> None:
    """Predictions of 0.2 and 0.25 in one bin with one true label have the error of the bin's gap."""
    assert abs(0.21 + 0.25 - 1) / 3 + abs(0.9 - 1) / 3 == pytest.approx(
        class_ece(np.array([0.21, 0.25, 0.9]), np.array([1.0, 0, 1]))
    )
    assert 0.0 == class_ece(np.array([]), np.array([]))


def test_brier_parts_of_an_example() -> None:
    """Two groups of forecasts of two classes have the exact parts and no residual."""
    p = np.array([[0.8, 0.2]] * 4 + [[0.3, 0.7]] * 2)
    q = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    parts = decompose_brier(p, q)
    assert 2 * (4 * 0.05**2 + 2 * 0.3**2) / 6 == pytest.approx(parts.reliability)
    assert 2 * (4 * 0.25**2 + 2 * 0.5**2) / 6 == pytest.approx(parts.resolution)
    assert 2 * 0.5 * 0.5 == pytest.approx(parts.uncertainty)
    assert 0.0 == pytest.approx(parts.residual, abs=1e-15)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_brier_parts_sum_to_the_brier_score(seed: int, classes: int, rows: int, soft: bool) -> None:
    """Reliability - resolution + uncertainty + residual is the Brier score, for hard and soft labels."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(classes), rows)
    q = random.dirichlet(np.ones(classes), rows) if soft else np.eye(classes)[random.integers(0, classes, rows)]
    parts = decompose_brier(p, q)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.residual
    assert ((p - q) ** 2).sum() / rows == pytest.approx(total, abs=1e-12)
    assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 1.5, 2.5])
@pytest.mark.parametrize("kind", ["rows", "engines"])
def test_ece_interval_contains_the_true_ece(sharpness: float, kind: str) -> None:
    """The interval from 1,000 rows contains the ECE of very many rows in at least 80 % of the cases, also zero."""
    covered, true_ece = 0, _true_ece(kind, sharpness)
    for seed in range(60):
        stream = _stream(kind, seed, sharpness)
        top = numerics.softmax(stream.z).max(axis=1)
        low, high = ece_interval(top, numerics.correct(stream.z, stream.label), group_by_engine(stream.engine))
        assert low <= numerics.ece(stream.z, stream.label) <= high
        covered += low <= true_ece <= high
    assert covered >= 48  # 54 expected at 90 %; 48 or fewer of 60 then has probability 1/50


def _stream(kind: str, seed: int, sharpness: float) -> Stream:
    random = np.random.default_rng(seed)
    return independent(random, 1000, sharpness) if kind == "rows" else fleet(random, 40, "outcome", sharpness)


def _true_ece(kind: str, sharpness: float) -> float:
    """Return zero if calibrated, else the ECE of 200,000 or more rows."""
    if sharpness == 1:
        return 0.0
    random = np.random.default_rng(99)
    stream = independent(random, 200_000, sharpness) if kind == "rows" else fleet(random, 4000, "outcome", sharpness)
    return numerics.ece(stream.z, stream.label)
