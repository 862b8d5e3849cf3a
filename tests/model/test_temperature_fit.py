import json
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.streams import Stream, fleet, independent
from model import numerics
from model.evaluation.temperature_fit import FitRefused, Reason, TemperatureFit, cross_validate_temperature


def fit_stream(stream: Stream, temperature: float = 1.0) -> TemperatureFit:
    return cross_validate_temperature(stream.z, stream.label, stream.engine, temperature)


def sharp_stream(seed: int = 0, engines: int = 200, sharpness: float = 1.5) -> Stream:
    return fleet(np.random.default_rng(seed), engines, "outcome", sharpness)


def test_fit_recovers_temperature_and_lowers_held_out_loss() -> None:
    """Logits that are 1.5 times too sharp give a temperature near 1.5 and a significant gain in both metrics."""
    fit = fit_stream(sharp_stream())
    assert 1.5 == pytest.approx(fit.temperature, rel=0.15)
    assert [fit.temperature] * 5 == pytest.approx(fit.held_out_temperatures, rel=0.2)
    assert fit.cross_entropy.after < fit.cross_entropy.before
    assert fit.cross_entropy.interval[0] < fit.cross_entropy.difference < fit.cross_entropy.interval[1] < 0
    assert fit.ece.interval[1] < 0
    assert fit.significant
    json.dumps(asdict(fit), allow_nan=False)


def test_held_out_metrics_equal_a_loop_over_folds() -> None:
    """Before and after equal those of a plain loop over folds of engines."""
    stream = sharp_stream(engines=30)
    fit, scaled = fit_stream(stream, 1.1), stream.z.copy()
    losses: list[float] = []
    rank = np.unique(stream.engine, return_inverse=True)[1]
    for fold in range(5):
        out = rank % 5 == fold
        t = numerics.fit_temperature(stream.z[~out], stream.label[~out], tolerance=1e-6)
        losses.extend(numerics.cross_entropy(stream.z[out], stream.label[out], t, reduction="none"))
        scaled[out] /= t
    before = float(numerics.cross_entropy(stream.z, stream.label, 1.1))
    assert (before, np.mean(losses)) == pytest.approx((fit.cross_entropy.before, fit.cross_entropy.after))
    assert numerics.ece(stream.z, stream.label, 1.1) == pytest.approx(fit.ece.before)
    assert numerics.ece(scaled, stream.label) == pytest.approx(fit.ece.after)
    assert numerics.fit_temperature(stream.z, stream.label) == pytest.approx(fit.temperature)


def test_fit_ignores_the_order_of_rows() -> None:
    """Shuffled rows give the same fit, folds and intervals included."""
    stream = sharp_stream(engines=40)
    order = np.random.default_rng(5).permutation(len(stream.label))
    shuffled = Stream(stream.z[order], stream.label[order], stream.engine[order])
    fit, shuffled_fit = asdict(fit_stream(stream)), asdict(fit_stream(shuffled))
    for name in ("temperature", "held_out_temperatures"):
        assert fit[name] == pytest.approx(shuffled_fit[name], rel=1e-6)
    for name in ("cross_entropy", "ece"):
        assert [*fit[name].pop("interval"), *fit[name].values()] == pytest.approx(
            [*shuffled_fit[name].pop("interval"), *shuffled_fit[name].values()], abs=1e-9
        )


def test_before_uses_the_temperature_of_each_row() -> None:
    """With one temperature per row, `before` is the loss at the temperature of the prediction."""
    stream = independent(np.random.default_rng(0), 2000, 1.5)
    temperatures = np.where(np.arange(2000) < 1000, 1.0, 1.2)
    fit = cross_validate_temperature(stream.z, stream.label, stream.engine, temperatures)
    z = stream.z / temperatures[:, None]
    assert float(numerics.cross_entropy(z, stream.label)) == pytest.approx(fit.cross_entropy.before)


def test_one_hot_labels_fit_like_indices() -> None:
    """One-hot distributions give the fit of class indices."""
    stream = sharp_stream(engines=40)
    soft = cross_validate_temperature(stream.z, np.eye(3)[stream.label], stream.engine, 1.0)
    assert fit_stream(stream) == soft


def stream_of_one_class(label: int) -> Stream:
    stream = sharp_stream(engines=40)
    return stream._replace(label=np.full(len(stream.label), label))


@pytest.mark.parametrize(
    ("stream", "reason", "message"),
    [
        (sharp_stream(engines=19), "too_few_engines", "19 engines are too few; a fit needs 20"),
        (independent(np.random.default_rng(0), 99), "too_few_rows", "99 labelled predictions"),
        (stream_of_one_class(0), "one_class", "all labels are of one class"),
        (sharp_stream(engines=60, sharpness=1.0, seed=1), "held_out_loss_does_not_fall", "raises cross-entropy by"),
    ],
)
def test_fit_without_gain_is_refused(stream: Stream, reason: Reason, message: str) -> None:
    """Too few engines or rows, one class, or no gain on held-out engines: the error has a message and a reason."""
    with pytest.raises(FitRefused, match=message) as refused:
        fit_stream(stream)
    assert reason == refused.value.reason


def test_fit_of_error_free_labels_is_refused() -> None:
    """If the model is always correct, the loss decreases with the temperature without a minimum."""
    z = independent(np.random.default_rng(0), 500).z
    with pytest.raises(FitRefused, match=r"bound 0\.01") as refused:
        cross_validate_temperature(z, z.argmax(axis=1), np.arange(500), 1.0)
    assert "no_finite_temperature" == refused.value.reason


def test_noise_is_rarely_a_significant_gain() -> None:
    """Few calibrated fleets get a fit, and very few a significant one."""
    significant = fits = 0
    for seed in range(30):
        with suppress(FitRefused):
            significant += fit_stream(sharp_stream(seed, 50, 1.0)).significant
            fits += 1
    assert fits <= 12
    assert significant <= 4  # at most 5 % if the interval is exact; 5 of 30 then has probability 1/60


@pytest.mark.parametrize(
    ("labels", "temperature", "engine"),
    [
        (np.zeros(3, dtype=int), 1.0, np.zeros(4)),
        (np.zeros(4, dtype=int), 0.0, np.zeros(4)),
        (np.zeros(4, dtype=int), np.ones(3), np.zeros(4)),
    ],
)
def test_fit_with_invalid_lengths_or_temperature_raises(
    labels: np.ndarray, temperature: object, engine: np.ndarray
) -> None:
    """A number of labels or temperatures unlike that of rows, or a temperature of zero, is an error."""
    with pytest.raises(ValueError, match=r"lengths|temperatures"):
        cross_validate_temperature(np.zeros((4, 3)), labels, engine, temperature)  # type: ignore[arg-type]  # an invalid type, on purpose
