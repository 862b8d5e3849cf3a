import json
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.streams import Stream, fleet, independent
from model import numerics
from model.evaluation.temperature_fit import FitRefused, Reason, TemperatureFit, cross_validate_temperature


def fitted(stream: Stream, temperature: float = 1.0) -> TemperatureFit:
    return cross_validate_temperature(stream.z, stream.label, stream.engine, temperature)


def sharp(seed: int = 0, engines: int = 200, sharpness: float = 1.5) -> Stream:
    return fleet(np.random.default_rng(seed), engines, "outcome", sharpness)


def test_a_planted_temperature_is_found_and_helps_engines_left_out() -> None:
    """Logits 1.5 times too sharp are mended by about 1.5; engines left out agree, surely, in both measures."""
    found = fitted(sharp())
    assert 1.5 == pytest.approx(found.temperature, rel=0.15)
    assert [found.temperature] * 5 == pytest.approx(found.held_out_temperatures, rel=0.2)
    assert found.cross_entropy.after < found.cross_entropy.before
    assert found.cross_entropy.interval[0] < found.cross_entropy.difference < found.cross_entropy.interval[1] < 0
    assert found.ece.interval[1] < 0
    assert found.significant
    json.dumps(asdict(found), allow_nan=False)


def test_held_out_measures_are_those_of_folds_by_engine() -> None:
    """Before and after are what a plain loop over folds of engines finds, to the last digits."""
    stream = sharp(engines=30)
    found, scaled = fitted(stream, 1.1), stream.z.copy()
    losses: list[float] = []
    rank = np.unique(stream.engine, return_inverse=True)[1]
    for fold in range(5):
        out = rank % 5 == fold
        t = numerics.fit_temperature(stream.z[~out], stream.label[~out], tolerance=1e-6)
        losses.extend(numerics.cross_entropy(stream.z[out], stream.label[out], t, reduction="none"))
        scaled[out] /= t
    before = float(numerics.cross_entropy(stream.z, stream.label, 1.1))
    assert (before, np.mean(losses)) == pytest.approx((found.cross_entropy.before, found.cross_entropy.after))
    assert numerics.ece(stream.z, stream.label, 1.1) == pytest.approx(found.ece.before)
    assert numerics.ece(scaled, stream.label) == pytest.approx(found.ece.after)
    assert numerics.fit_temperature(stream.z, stream.label) == pytest.approx(found.temperature)


def test_the_order_of_rows_does_not_matter() -> None:
    """Shuffled rows give the same fit, folds and intervals included."""
    stream = sharp(engines=40)
    order = np.random.default_rng(5).permutation(len(stream.label))
    shuffled = Stream(stream.z[order], stream.label[order], stream.engine[order])
    one, other = asdict(fitted(stream)), asdict(fitted(shuffled))
    for name in ("temperature", "held_out_temperatures"):
        assert one[name] == pytest.approx(other[name], rel=1e-6)
    for name in ("cross_entropy", "ece"):
        assert [*one[name].pop("interval"), *one[name].values()] == pytest.approx(
            [*other[name].pop("interval"), *other[name].values()], abs=1e-9
        )


def test_each_row_is_compared_with_the_temperature_that_answered_it() -> None:
    """With one temperature for each row, `before` is the loss as it was answered."""
    stream = independent(np.random.default_rng(0), 2000, 1.5)
    answered = np.where(np.arange(2000) < 1000, 1.0, 1.2)
    found = cross_validate_temperature(stream.z, stream.label, stream.engine, answered)
    z = stream.z / answered[:, None]
    assert float(numerics.cross_entropy(z, stream.label)) == pytest.approx(found.cross_entropy.before)


def test_soft_labels_are_labels() -> None:
    """Distributions certain of a class fit as its index does."""
    stream = sharp(engines=40)
    soft = cross_validate_temperature(stream.z, np.eye(3)[stream.label], stream.engine, 1.0)
    assert fitted(stream) == soft


def engines_of_one(label: int) -> Stream:
    stream = sharp(engines=40)
    return stream._replace(label=np.full(len(stream.label), label))


@pytest.mark.parametrize(
    ("stream", "reason", "words"),
    [
        (sharp(engines=19), "too_few_engines", "19 engines are too few; a fit needs 20"),
        (independent(np.random.default_rng(0), 99), "too_few_rows", "99 labelled predictions"),
        (engines_of_one(0), "one_class", "all labels are of one class"),
        (sharp(engines=60, sharpness=1.0, seed=1), "held_out_loss_does_not_fall", "raises cross-entropy by"),
    ],
)
def test_a_fit_that_helps_nobody_is_refused(stream: Stream, reason: Reason, words: str) -> None:
    """Too few engines or rows, one class, or no gain on engines left out: refused with a sentence and a name."""
    with pytest.raises(FitRefused, match=words) as refused:
        fitted(stream)
    assert reason == refused.value.reason


def test_labels_that_contradict_nothing_have_no_temperature() -> None:
    """Where the model is always right, the loss falls for ever with the temperature, and no fit is given."""
    z = independent(np.random.default_rng(0), 500).z
    with pytest.raises(FitRefused, match=r"bound 0\.01") as refused:
        cross_validate_temperature(z, z.argmax(axis=1), np.arange(500), 1.0)
    assert "no_finite_temperature" == refused.value.reason


def test_noise_is_never_taken_for_a_sure_gain() -> None:
    """Of calibrated fleets few are given a fit, and hardly any a sure one."""
    sure = given = 0
    for seed in range(30):
        with suppress(FitRefused):
            sure += fitted(sharp(seed, 50, 1.0)).significant
            given += 1
    assert given <= 12
    assert sure <= 4  # 5 % at most, were the interval exact: 5 of 30 come once in 60


@pytest.mark.parametrize(
    ("labels", "temperature", "engine"),
    [
        (np.zeros(3, dtype=int), 1.0, np.zeros(4)),
        (np.zeros(4, dtype=int), 0.0, np.zeros(4)),
        (np.zeros(4, dtype=int), np.ones(3), np.zeros(4)),
    ],
)
def test_lengths_and_temperatures_must_fit(labels: np.ndarray, temperature: object, engine: np.ndarray) -> None:
    """Another number of labels or temperatures than rows, or a temperature of zero, is an error of the caller."""
    with pytest.raises(ValueError, match=r"fit|temperatures"):
        cross_validate_temperature(np.zeros((4, 3)), labels, engine, temperature)  # type: ignore[arg-type]  # the point of the test
