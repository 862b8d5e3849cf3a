import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.streams import Stream, fleet, independent
from model import numerics
from model.evaluation.cluster_bootstrap import group_by_engine
from model.evaluation.reliability import class_ece, decompose_brier, ece_interval, equal_mass_ece


def test_equal_mass_by_hand() -> None:
    """Four rows in two bins of two: each bin is off by a tenth and two fifths."""
    confidence, correct = np.array([0.9, 0.6, 0.8, 0.7]), np.array([1.0, 0, 1, 1])
    assert (abs(0.6 + 0.7 - 1) + abs(0.8 + 0.9 - 2)) / 4 == pytest.approx(equal_mass_ece(confidence, correct, 2))


def test_equal_mass_keeps_equal_confidences_together() -> None:
    """Rows of one confidence are one bin, so their order cannot matter."""
    correct = np.arange(40) % 2
    assert 0.3 == pytest.approx(equal_mass_ece(np.full(40, 0.8), correct.astype(float)))
    assert 0.3 == pytest.approx(equal_mass_ece(np.full(40, 0.8), np.sort(correct).astype(float)))
    assert 0.0 == equal_mass_ece(np.array([]), np.array([]))


def test_equal_masses_are_about_equal() -> None:
    """Distinct confidences fill bins that differ by one row at most: ECE with an error in one bin says its share."""
    confidence = np.random.default_rng(0).permutation(np.linspace(0.5, 1, 100))
    correct = np.where(confidence > np.sort(confidence)[-8], 1.0, confidence)
    assert (1 - np.sort(confidence)[-7:]).sum() / 100 == pytest.approx(equal_mass_ece(confidence, correct))


def test_class_ece_by_hand() -> None:
    """A class said with 0.2 and 0.25 in one bin, true once of two, is off by the gap of the bin."""
    assert abs(0.21 + 0.25 - 1) / 3 + abs(0.9 - 1) / 3 == pytest.approx(
        class_ece(np.array([0.21, 0.25, 0.9]), np.array([1.0, 0, 1]))
    )
    assert 0.0 == class_ece(np.array([]), np.array([]))


def test_brier_parts_by_hand() -> None:
    """Two kinds of forecast of two classes: the parts are what paper gives, and there is no residual."""
    p = np.array([[0.8, 0.2]] * 4 + [[0.3, 0.7]] * 2)
    q = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    found = decompose_brier(p, q)
    assert 2 * (4 * 0.05**2 + 2 * 0.3**2) / 6 == pytest.approx(found.reliability)
    assert 2 * (4 * 0.25**2 + 2 * 0.5**2) / 6 == pytest.approx(found.resolution)
    assert 2 * 0.5 * 0.5 == pytest.approx(found.uncertainty)
    assert 0.0 == pytest.approx(found.residual, abs=1e-15)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_brier_parts_add_up(seed: int, classes: int, rows: int, soft: bool) -> None:
    """Reliability less resolution plus uncertainty plus residual is the Brier score, hard truth or soft."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(classes), rows)
    q = random.dirichlet(np.ones(classes), rows) if soft else np.eye(classes)[random.integers(0, classes, rows)]
    found = decompose_brier(p, q)
    total = found.reliability - found.resolution + found.uncertainty + found.residual
    assert ((p - q) ** 2).sum() / rows == pytest.approx(total, abs=1e-12)
    assert min(found.reliability, found.resolution, found.uncertainty) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 1.5, 2.5])
@pytest.mark.parametrize("kind", ["rows", "engines"])
def test_the_interval_of_ece_holds_the_truth(sharpness: float, kind: str) -> None:
    """The ECE of very many rows lies in the interval from a thousand of them at least four times in five, also zero."""
    covered, truth = 0, _true_ece(kind, sharpness)
    for seed in range(60):
        stream = _stream(kind, seed, sharpness)
        top = numerics.softmax(stream.z).max(axis=1)
        low, high = ece_interval(top, numerics.correct(stream.z, stream.label), group_by_engine(stream.engine))
        assert low <= numerics.ece(stream.z, stream.label) <= high
        covered += low <= truth <= high
    assert covered >= 48  # 54 expected at 90 %; 48 or fewer of 60 come once in 50 at that


def _stream(kind: str, seed: int, sharpness: float) -> Stream:
    random = np.random.default_rng(seed)
    return independent(random, 1000, sharpness) if kind == "rows" else fleet(random, 40, "outcome", sharpness)


def _true_ece(kind: str, sharpness: float) -> float:
    """Zero where calibrated, else from 200,000 rows and more."""
    if sharpness == 1:
        return 0.0
    random = np.random.default_rng(99)
    stream = independent(random, 200_000, sharpness) if kind == "rows" else fleet(random, 4000, "outcome", sharpness)
    return numerics.ece(stream.z, stream.label)
