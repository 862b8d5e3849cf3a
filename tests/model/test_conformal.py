import numpy as np
import pytest

from model import numerics
from model.evaluation import conformal
from model.evaluation.conformal import Method
from model.evaluation.evaluation_metrics import (
    EvaluatedRows,
    class_metrics,
    macro_f1,
    nasa_score,
    rul_metrics,
    set_metrics,
)
from model.training.calibrate import safe_threshold


def calibrated(n: int, seed: int) -> tuple[numerics.Floats, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (n, 3))
    p = numerics.softmax(logits)
    return logits, (random.random(n)[:, None] > p.cumsum(axis=1)).sum(axis=1)


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_sets_have_the_configured_coverage(method: Method) -> None:
    """A threshold fitted to one half covers 90 % of the other half, or slightly more because sets are never empty."""
    logits, labels = calibrated(40_000, 0)
    limit = conformal.fit_threshold(logits[::2], labels[::2], np.ones(20_000), 1.0, 0.9, method)
    sets = conformal.prediction_sets(logits[1::2], 1.0, limit, method)
    assert 0.89 <= set_metrics(labels[1::2], sets)["coverage"] <= 0.93
    assert sets[np.arange(20_000), logits[1::2].argmax(axis=1)].all()


def test_class_scores_of_an_example() -> None:
    """For p = 0.5, 0.3, 0.2, LAC scores 1 - p, and APS the mass down to the class."""
    logits = np.log([[0.5, 0.3, 0.2]])
    np.testing.assert_allclose([[0.5, 0.7, 0.8]], conformal.class_scores(logits, 1.0, "lac"))
    np.testing.assert_allclose([[0.5, 0.8, 1.0]], conformal.class_scores(logits, 1.0, "aps"))


def test_lac_sets_are_smaller_than_aps_sets() -> None:
    """At the same coverage, LAC sets are smaller on average."""
    logits, labels = calibrated(20_000, 1)
    size = {}
    for method in ("lac", "aps"):
        limit = conformal.fit_threshold(logits, labels, np.ones(len(labels)), 1.0, 0.9, method)
        size[method] = conformal.prediction_sets(logits, 1.0, limit, method).sum(axis=1).mean()
    assert size["lac"] < size["aps"]


def test_safe_threshold_approaches_fitted_one_with_engines() -> None:
    """The safe threshold exceeds the fitted one, and the difference decreases with more engines, not with more rows."""
    logits, labels = calibrated(20_000, 3)
    plain = conformal.fit_threshold(logits, labels, np.ones(20_000), 1.0, 0.9)
    few, many = (
        safe_threshold(logits, labels, np.ones(20_000), np.arange(20_000) % engines, 1.0, draws=50)
        for engines in (10, 5000)
    )
    clustered = safe_threshold(
        logits, labels, np.ones(20_000), logits.max(1).argsort().argsort() // 2000, 1.0, draws=50
    )
    assert plain < many < plain + 0.02
    assert many < clustered
    assert plain <= few


def test_weighted_rows_equal_repeated_rows() -> None:
    """A row of weight 3 changes the threshold like three rows."""
    logits, labels = calibrated(500, 2)
    weights = np.random.default_rng(0).integers(1, 4, 500)
    repeated = conformal.fit_threshold(
        np.repeat(logits, weights, 0), np.repeat(labels, weights), np.ones(weights.sum()), 1, 0.9
    )
    assert repeated == conformal.fit_threshold(logits, labels, weights.astype(float), 1.0, 0.9)


def test_evaluation_metrics_of_an_example() -> None:
    """Four rows have one two-step error and half of the critical recall; a RUL that is too high costs more."""
    logits = np.log([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    rows = EvaluatedRows(logits, np.array([0, 1, 2, 2]), np.array([125.0, 90, 60, 10]), np.array([200.0, 100, 40, 10]))
    line = class_metrics(rows, 1.0) | rul_metrics(rows)
    assert (0.75, 0.25, 0.5) == (line["accuracy"], line["two-step errors"], line["critical recall"])
    assert -np.mean(np.log([0.8, 0.8, 0.1, 0.8])) == pytest.approx(line["cross-entropy"])
    assert np.sqrt((0 + 100 + 400 + 0) / 4) == pytest.approx(line["RUL RMSE"])
    assert np.sqrt((75**2 + 100 + 400) / 4) == pytest.approx(line["raw RMSE"])
    assert np.exp(10 / 13) - 1 + np.exp(20 / 10) - 1 == pytest.approx(line["NASA score"])
    assert nasa_score(np.array([20.0]), np.array([10.0])) > nasa_score(np.array([0.0]), np.array([10.0]))
    assert np.mean([2 / 3, 1, 2 / 3]) == pytest.approx(macro_f1(logits.argmax(1), rows.labels, 3))
