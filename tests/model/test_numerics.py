import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model import numerics

FOUR_ENGINES = [[2, 0.5, -1], [0, 2, 0.3], [-1, 0.4, 3.8], [0.2, 0.5, 0.2]]
FOUR_TRUTHS = [0, 1, 2, 1]
rows = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-1e4, 1e4))
temperatures = st.floats(0.01, 100)


@given(rows, temperatures)
def test_softmax_is_a_distribution(logits: np.ndarray, t: float) -> None:
    """Softmax is never negative and sums to one, whatever the logits and the temperature."""
    p = numerics.softmax(logits, t)
    assert (p >= 0).all()
    np.testing.assert_allclose(1.0, p.sum(axis=1), atol=1e-12)


@given(rows, temperatures, st.floats(-1e4, 1e4))
def test_softmax_ignores_a_shift(logits: np.ndarray, t: float, shift: float) -> None:
    """Adding the same number to every logit changes nothing but rounding."""
    np.testing.assert_allclose(numerics.softmax(logits, t), numerics.softmax(logits + shift, t), atol=1e-7)


@given(rows, temperatures)
def test_temperature_keeps_the_order(logits: np.ndarray, t: float) -> None:
    """A temperature sharpens or flattens, but the more probable class stays at least as probable."""
    order = np.argsort(logits, axis=1)
    assert (np.diff(np.take_along_axis(numerics.softmax(logits, t), order, axis=1), axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1e4, 0, -1e4], [1, 0, 0]),
        ([-1e4, -1e4, -1e4], [1 / 3, 1 / 3, 1 / 3]),
        ([-100, 0, 1], [0, 0.2689414214, 0.7310585786]),
        ([7], [1]),
    ],
)
def test_softmax_at_its_edges(logits: list[float], expected: list[float]) -> None:
    """Huge, equal, far apart and single logits give the probabilities that paper gives."""
    np.testing.assert_allclose(expected, numerics.softmax(logits), atol=1e-10)
    np.testing.assert_allclose(1.0, np.exp(numerics.log_softmax(logits)).sum())


def test_log_softmax_keeps_what_softmax_rounds_away() -> None:
    """The logarithm of a probability too small for a float is still exact."""
    np.testing.assert_allclose([-2e4, 0], numerics.log_softmax([-1e4, 1e4]))


def test_softmax_agrees_with_torch() -> None:
    """On 10,000 random rows softmax and its logarithm are torch's to float precision."""
    logits = np.random.default_rng(0).normal(0, 10, (10_000, 3))
    np.testing.assert_allclose(torch.softmax(torch.tensor(logits), 1).numpy(), numerics.softmax(logits), rtol=1e-12)
    np.testing.assert_allclose(torch.log_softmax(torch.tensor(logits), 1), numerics.log_softmax(logits), rtol=1e-12)


def test_temperature_has_two_limits() -> None:
    """A high temperature tends to the uniform distribution, a low one to certainty."""
    logits = [0.3, 0.1, -0.2]
    np.testing.assert_allclose([1 / 3] * 3, numerics.softmax(logits, 100), atol=2e-3)
    np.testing.assert_allclose([1, 0, 0], numerics.softmax(logits, 0.01), atol=1e-8)


@pytest.mark.parametrize("t", [0, -1, 0.009, 101, np.nan, np.inf])
def test_temperature_is_bounded(t: float) -> None:
    """A temperature outside 0.01..100 is refused."""
    with pytest.raises(ValueError, match="temperature"):
        numerics.softmax([1, 2], t)


def test_scaled_at_its_bounds_accepts() -> None:
    """The largest logits and both bounds of the temperature are accepted, and divided."""
    assert [1e150, -1e150] == numerics.scaled([1e150, -1e150]).tolist()
    assert [100.0, 0.01] == [float(numerics.scaled(1.0 * np.ones(1), t)[0]) for t in (0.01, 100)]


def test_scaled_rows_divides_each_row_by_its_temperature() -> None:
    """Each row has its temperature, bounds included; one temperature is for all rows."""
    logits = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    expected = [[100.0, 200.0], [1.5, 2.0], [0.05, 0.06]]
    np.testing.assert_allclose(expected, numerics.scaled_rows(logits, [0.01, 2, 100]), rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(logits) / 2, numerics.scaled_rows(logits, 2))


@pytest.mark.parametrize(
    ("logits", "temperatures", "message"),
    [
        ([[1, 2], [3, 4]], [1, 1, 1], r"logits of shape \(2, 2\) and temperatures of shape \(3,\) do not match"),
        ([[1, 2], [3, 4]], [[1, 1]], "do not match"),
        ([1, 2], 1, "do not match"),
        ([1, 2], [1, 1], "do not match"),
        ([[1, 2], [3, 4]], [1, 0.009], "^temperatures must be from 0.01 to 100$"),
        ([[1, 2], [3, 4]], [1, 101], "temperatures must be"),
        ([[1, 2], [3, 4]], 0, "temperatures must be"),
        ([[1, 2], [3, 4]], [1, np.nan], "temperatures must be"),
        ([[np.nan, 2], [3, 4]], [1, 1], "logits must be finite"),
    ],
)
def test_scaled_rows_with_wrong_shape_or_value_raises(logits: list[object], temperatures: object, message: str) -> None:
    """Lengths that differ, logits that are not rows and temperatures out of bounds are refused."""
    with pytest.raises(ValueError, match=message):
        numerics.scaled_rows(logits, temperatures)  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("logits", [[np.nan, 1], [np.inf, 1], [1e200, 1], [], 3.0, [[]]])
def test_logits_must_be_finite_and_have_classes(logits: object) -> None:
    """Logits that are not finite, or have no class, are refused."""
    with pytest.raises(ValueError, match=r"^logits (must be finite|need at least one class)"):
        numerics.log_softmax(logits)  # type: ignore[arg-type]  # the point of the test


def test_cross_entropy_at_certainty_uniform_and_error() -> None:
    """The loss is 0 at certainty, ln C at uniform, and grows without bound but stays finite on a confident mistake."""
    assert float(numerics.cross_entropy([[1e4, 0, 0]], [0])) == 0.0
    assert np.log(3) == pytest.approx(float(numerics.cross_entropy([[5, 5, 5]], [1])))
    assert [10.0, 100.0, 1e4] == pytest.approx(
        [float(numerics.cross_entropy([[z, 0]], [1])) for z in (10, 100, 1e4)], rel=1e-5
    )


@pytest.mark.parametrize(("p", "loss"), [(0.96, 0.041), (0.40, 0.916), (0.01, 4.605)])
def test_cross_entropy_of_a_probability(p: float, loss: float) -> None:
    """The loss of a true class of probability p is -ln p."""
    assert loss == pytest.approx(float(numerics.cross_entropy([[np.log(p), np.log(1 - p)]], [0])), abs=5e-4)


def test_cross_entropy_of_the_worked_batch() -> None:
    """Four engines and three classes give the losses that the textbook works out, and torch's mean."""
    losses = numerics.cross_entropy(FOUR_ENGINES, FOUR_TRUTHS, reduction="none")
    p = numerics.softmax(FOUR_ENGINES)
    assert (0.960, 0.403) == (round(float(p[2, 2]), 3), round(float(p[3, 1]), 3))
    assert (0.041, 0.909) == (round(float(losses[2]), 3), round(float(losses[3]), 3))
    expected = torch.nn.functional.cross_entropy(torch.tensor(FOUR_ENGINES), torch.tensor(FOUR_TRUTHS))
    assert 0.3668 == round(float(expected), 4) == round(float(numerics.cross_entropy(FOUR_ENGINES, FOUR_TRUTHS)), 4)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5], [0.0, 1.0, 3.0]])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_agrees_with_torch(weight: list[float] | None, soft: bool, reduction: numerics.Reduction) -> None:
    """On 10,000 random rows the loss is torch's, with and without class weights, hard and soft."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 5, (10_000, 3))
    targets = random.dirichlet([1, 1, 1], 10_000) if soft else random.integers(0, 3, 10_000)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(targets), w, reduction=reduction)
    found = numerics.cross_entropy(logits, targets, class_weights=weight, reduction=reduction)
    np.testing.assert_allclose(expected.numpy(), found, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_loss_is_p_minus_y() -> None:
    """What training pushes the logits by is the probability minus the truth, as autograd finds."""
    logits = torch.tensor(FOUR_ENGINES, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, torch.tensor(FOUR_TRUTHS), reduction="sum").backward()  # type: ignore[no-untyped-call]  # torch ships it so
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad, numerics.softmax(FOUR_ENGINES) - np.eye(3)[FOUR_TRUTHS], atol=1e-12)


def test_index_and_one_hot_agree() -> None:
    """A class index and the distribution that is certain of it cost the same."""
    hard = numerics.cross_entropy(FOUR_ENGINES, FOUR_TRUTHS, reduction="none")
    np.testing.assert_array_equal(hard, numerics.cross_entropy(FOUR_ENGINES, np.eye(3)[FOUR_TRUTHS], reduction="none"))


def test_a_million_classes_fit() -> None:
    """One label among a million classes costs a row, not a square."""
    row = numerics.as_distributions([7], 10**6)
    assert ((1, 10**6), 1.0, 1.0) == (row.shape, row[0, 7], row.sum())


@pytest.mark.parametrize("targets", [[3], [-1], [0.5], [[0.5, 0.2, 0.2]], [[1.5, -0.5, 0]], [[0.5, 0.5]], [0, 1]])
def test_targets_must_be_classes_or_distributions(targets: list[object]) -> None:
    """A target that is no class and no distribution over the classes is refused."""
    with pytest.raises(ValueError, match=r"indices|distribution|targets"):
        numerics.cross_entropy([[1.0, 2.0, 3.0]], targets)  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("weights", [[1, 1], [1, -1, 1], [np.nan, 1, 1], [0, 0, 0]])
def test_class_weights_must_make_a_mean(weights: list[float]) -> None:
    """Class weights of another length, negative, not finite or all zero are refused."""
    with pytest.raises(ValueError, match="weight"):
        numerics.cross_entropy([[1.0, 2.0, 3.0]], [0], class_weights=weights)


def test_distribution_within_the_tolerance_is_accepted() -> None:
    """A distribution may sum to 0.9999 or to 1.0001, also in one class; beyond that it is refused."""
    for row in ([1.0001, 0, 0], [0.5, 0.3, 0.1999], [0.5, 0.3, 0.2001]):
        np.testing.assert_array_equal([row], numerics.as_distributions([row], 3))
    for row in ([1.0002, 0, 0], [0.5, 0.3, 0.1998]):
        with pytest.raises(ValueError, match=r"^a distribution needs probabilities >= 0 that sum to 1$"):
            numerics.as_distributions([row], 3)


def test_class_indices_beyond_the_classes_name_the_last_one() -> None:
    """An index outside of three classes is refused, and the error names 2 as the largest."""
    with pytest.raises(ValueError, match=r"^class indices must be from 0 to 2$"):
        numerics.as_distributions([3], 3)


def test_class_weights_at_their_bounds_are_accepted() -> None:
    """A class weight may be 0 or the largest one."""
    assert 1e9 * np.log(2) == pytest.approx(
        float(numerics.cross_entropy([[1.0, 1.0]], [1], class_weights=[0, numerics.MAX_WEIGHT], reduction="sum"))
    )


def test_mean_of_rows_without_weight_is_refused() -> None:
    """A mean over classes whose weights are all 0 does not exist; the sum is 0."""
    with pytest.raises(ValueError, match=r"^a mean needs at least one row whose class weight is above 0$"):
        numerics.cross_entropy([[1.0, 2.0]], [1], class_weights=[1, 0])
    assert 0.0 == float(numerics.cross_entropy([[1.0, 2.0]], [1], class_weights=[1, 0], reduction="sum"))


def test_one_row_is_measured_like_a_batch_of_one() -> None:
    """Logits of one row give the figures of a batch of one, at temperature 1 unless another is given."""
    row = [0.3, -1.0, 2.0]
    for measure in (numerics.entropy, numerics.loss_variance):
        assert float(measure(row)) == float(measure([row])[0]) == float(measure(row, 1.0))
        assert float(measure(row, 2.0)) == pytest.approx(float(measure(np.divide(row, 2))))
    assert numerics.brier(row, 1).tolist() == numerics.brier([row], [1], 1.0).tolist()


def test_probabilities_given_as_logits_hide_every_loss() -> None:
    """Softmaxed twice, a three-class loss can never fall below 0.5514, however certain the model was."""
    certain = [[1.0, 0.0, 0.0]]
    assert 0.5514 == round(float(numerics.cross_entropy(certain, [0])), 4)
    assert 0.0 == float(numerics.cross_entropy(np.log(np.maximum(certain, 1e-300)), [0]))


@given(rows, temperatures)
def test_expected_loss_is_the_mean_over_all_truths(logits: np.ndarray, t: float) -> None:
    """Entropy and loss variance are mean and variance of the loss when the truth falls as the model says."""
    p, n = numerics.softmax(logits, t), logits.shape[1]
    losses = np.stack(
        [numerics.cross_entropy(logits, np.full(len(logits), k), t, reduction="none") for k in range(n)], axis=1
    )
    mean = (p * losses).sum(axis=1)
    np.testing.assert_allclose(mean, numerics.entropy(logits, t), atol=1e-9)
    np.testing.assert_allclose(
        (p * (losses - mean[:, None]) ** 2).sum(axis=1), numerics.loss_variance(logits, t), atol=1e-7
    )


def test_brier_sums_over_classes() -> None:
    """Brier is 0 at certainty, 2 at certain error, and (C - 1) / C at uniform."""
    logits = [[1e4, 0.0, 0.0], [1e4, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert [0, 2, 2 / 3] == pytest.approx(numerics.brier(logits, [0, 1, 2]).tolist())


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_calibration_measures_divide_by_temperature(temperature: float) -> None:
    """Brier, reliability, ECE and its noise band at a temperature are those of divided logits, and 1 by default."""
    random = np.random.default_rng(5)
    logits, truth = random.normal(0, 2, (200, 3)), random.integers(0, 3, 200)
    scaled = logits / temperature
    np.testing.assert_allclose(numerics.brier(scaled, truth), numerics.brier(logits, truth, temperature))
    assert numerics.ece(scaled, truth) == pytest.approx(numerics.ece(logits, truth, temperature))
    assert numerics.ece_noise_band(scaled) == pytest.approx(numerics.ece_noise_band(logits, temperature))
    divided, found = numerics.reliability(scaled, truth), numerics.reliability(logits, truth, temperature)
    np.testing.assert_allclose(divided.confidence, found.confidence)
    np.testing.assert_allclose(divided.count, found.count)


def test_reliability_has_as_many_bins_as_asked() -> None:
    """Counts, confidences and hits of a row are in the bin of its top probability, of any number of bins."""
    logits = np.log([[0.9, 0.1], [0.65, 0.35], [0.2, 0.8]])
    found = numerics.reliability(logits, [0, 1, 1], bins=10)
    assert [0] * 6 + [1, 1, 1, 0] == found.count.tolist()
    np.testing.assert_allclose([0] * 6 + [0.65, 0.8, 0.9, 0], found.confidence)
    assert [0] * 6 + [0, 1, 1, 0] == found.correct.tolist()
    assert (0.65 + 0.2 + 0.1) / 3 == pytest.approx(numerics.ece(logits, [0, 1, 1], bins=10))
    assert abs(2.35 - 2) / 3 == pytest.approx(numerics.ece(logits, [0, 1, 1], bins=1))


def test_ece_of_few_rows_is_divided_by_their_number() -> None:
    """One row of 0.9 that is wrong is off by 0.9; without rows there is no error."""
    assert 0.9 == pytest.approx(numerics.ece([np.log([0.9, 0.1])], [1]))
    assert 0.0 == numerics.ece(np.empty((0, 2)), np.empty(0, dtype=int))


def test_noise_band_defaults_are_200_draws_of_seed_0() -> None:
    """Without options the band has 200 draws of seed 0 in 15 bins; rows up to `coins` are tossed one by one."""
    logits = np.random.default_rng(6).normal(0, 2, (500, 3))
    found = numerics.ece_noise_band(logits)
    assert found == numerics.ece_noise_band(logits, 1.0, draws=200, seed=0, bins=numerics.RELIABILITY_BINS, coins=500)
    for options in ({"draws": 201}, {"seed": 1}, {"bins": 3}, {"coins": 499}):
        assert found != numerics.ece_noise_band(logits, **options)


@pytest.mark.parametrize("coins", [0, 10**6])
def test_noise_band_of_one_confidence_is_normal(coins: int) -> None:
    """10,000 rows of 0.9 have an error of 0.003 times a standard normal, tossed one by one or not."""
    logits = np.tile(np.log([0.9, 0.1]), (10_000, 1))
    low, high = numerics.ece_noise_band(logits, draws=4000 if coins else 40_000, coins=coins)
    assert 0.003 * 1.95996 == pytest.approx(high, rel=0.05)
    assert 0.003 * 0.06271 == pytest.approx(low, rel=0.3)


def test_noise_band_of_several_bins_equals_tossed_band() -> None:
    """The band of normal sums in each bin is the band of tossed coins, which differs between numbers of bins."""
    logits = np.random.default_rng(7).normal(0, 2, (3000, 3))
    bands = {bins: numerics.ece_noise_band(logits, draws=2000, bins=bins, coins=0) for bins in (2, 15)}
    for bins, band in bands.items():
        assert band == pytest.approx(numerics.ece_noise_band(logits, draws=2000, bins=bins), rel=0.2)
    assert bands[15][0] > 1.5 * bands[2][0]


def test_noise_band_without_rows_is_zero() -> None:
    """No rows have no error."""
    assert (0.0, 0.0) == numerics.ece_noise_band(np.empty((0, 3)))


def test_noise_band_of_one_row_is_its_two_errors() -> None:
    """One row of 0.7 is off by 0.3 if it is right and by 0.7 if it is wrong."""
    assert (0.3, 0.7) == pytest.approx(numerics.ece_noise_band([np.log([0.7, 0.3])]))


def test_reliability_bins_are_closed_above() -> None:
    """A confidence on the border of two bins belongs to the lower one, and 1.0 to the last."""
    assert [0, 0, 1, 4, 14] == numerics.bin_of([0.0, 1 / 15, 1 / 15 + 1e-9, 5 / 15, 1.0]).tolist()


def test_ece_by_hand() -> None:
    """Four predictions of 0.9 of which three are right are off by 0.15."""
    logits = np.tile(np.log([0.9, 0.1]), (4, 1))
    assert 0.15 == pytest.approx(numerics.ece(logits, [0, 0, 0, 1]))


def test_ece_of_a_calibrated_model_lies_in_its_noise_band() -> None:
    """Truth drawn from the model's own probabilities gives an ECE inside the band in about nine cases of ten."""
    random, inside = np.random.default_rng(2), 0
    for _ in range(100):
        logits = random.normal(0, 2, (300, 3))
        truth = (numerics.softmax(logits).cumsum(axis=1) < random.random((300, 1))).sum(axis=1)
        low, high = numerics.ece_noise_band(logits, draws=100)
        inside += low <= numerics.ece(logits, truth) <= high
    assert 80 <= inside <= 98


@pytest.mark.parametrize("planted", [0.5, 1.0, 1.7, 4.0])
def test_fit_temperature_finds_the_planted_one(planted: float) -> None:
    """From 50,000 rows the temperature that blurred the truth is found within 2 %."""
    random = np.random.default_rng(3)
    logits = random.normal(0, 3, (50_000, 3))
    truth = (numerics.softmax(logits, planted).cumsum(axis=1) < random.random((50_000, 1))).sum(axis=1)
    assert planted == pytest.approx(numerics.fit_temperature(logits, truth), rel=0.02)


def test_fit_temperature_never_raises_the_loss() -> None:
    """The fitted temperature costs no more than any other on the rows that it was fitted on."""
    random = np.random.default_rng(4)
    logits, truth = random.normal(0, 3, (500, 4)), random.integers(0, 4, 500)
    best = numerics.cross_entropy(logits, truth, numerics.fit_temperature(logits, truth))
    assert all(best <= numerics.cross_entropy(logits, truth, t) + 1e-12 for t in np.geomspace(0.01, 100, 200))


@pytest.mark.parametrize(
    ("logits", "targets", "expected"),
    [
        ([[5, 0], [0, 5]], [0, 1], 0.01),  # separable: nothing contradicts the model
        ([[5, 0], [0, 5]], [1, 0], 100.0),  # always wrong
        ([[1, 0, 0]], [0], 0.01),  # one row
        ([[50, 0], [0, 50]], [0, 1], 0.01),  # so certain that the slope is exactly 0
        ([[3], [4]], [0, 0], 1.0),  # one class: nothing depends on the temperature
        ([[2, 2], [7, 7]], [0, 1], 1.0),
    ],
)
def test_fit_temperature_is_bounded(logits: list[list[float]], targets: list[int], expected: float) -> None:
    """Where no finite temperature is best, the answer is the bound, and 1 where none matters."""
    assert expected == numerics.fit_temperature(logits, targets)


@pytest.mark.parametrize(
    ("logits", "targets", "weights"),
    [
        (np.empty((0, 3)), [], None),
        ([[1, 2]], [0], [0]),
        ([[1, 2]], [0], [-1]),
        ([[1, 2], [2, 1]], [0, 1], [2, -1]),
        ([[1, 2]], [0], [np.inf]),
        ([[1, 2]], [0], [np.nan]),
        ([[1, 2]], [0, 1], None),
        ([[1, 2], [2, 1]], [0], None),
        ([[1, 2], [2, 1]], [0, 1], [1]),
        ([[1, 2], [2, 1]], [0, 1], 1),
    ],
)
def test_fit_temperature_needs_rows(logits: object, targets: list[int], weights: list[float] | None) -> None:
    """No rows, or none that weighs anything, is an error and not a temperature."""
    with pytest.raises(ValueError, match=r"^a temperature needs rows"):
        numerics.fit_temperature(logits, np.array(targets, dtype=int), weights)  # type: ignore[arg-type]  # empty array


def test_fit_temperature_weight_repeats_row() -> None:
    """A weight of two is the row twice, a weight of zero its absence, and only the ratio of weights matters."""
    random = np.random.default_rng(8)
    logits, truth, weights = random.normal(0, 2, (300, 3)), random.integers(0, 3, 300), random.integers(0, 4, 300)
    truth[:200] = logits[:200].argmax(axis=1)
    expected = numerics.fit_temperature(np.repeat(logits, weights, axis=0), np.repeat(truth, weights))
    assert expected != pytest.approx(numerics.fit_temperature(logits, truth), rel=0.01)
    for scale in (1, 0.25, 1e-9, 1e9):
        assert expected == pytest.approx(numerics.fit_temperature(logits, truth, weights * scale), rel=1e-6)
    large = np.where(weights > 1, 3e38, 0).astype(np.float32)  # whose sum float32 does not hold
    assert numerics.fit_temperature(logits, truth, weights > 1) == pytest.approx(
        numerics.fit_temperature(logits, truth, large), rel=1e-6
    )
    for targets, bound in (([0, 1], 0.01), ([1, 0], 100.0)):
        assert bound == numerics.fit_temperature([[5, 0], [0, 5]], targets, [1e-6, 1e-6])


def test_fit_temperature_ignores_a_shift_of_each_row() -> None:
    """Rows far from zero, each by another distance, have the temperature of the same rows near zero."""
    random = np.random.default_rng(9)
    logits, truth = random.integers(-8, 9, (400, 3)) / 4, random.integers(0, 3, 400)
    truth[:250] = logits[:250].argmax(axis=1)
    shift = random.choice([-1.0, 0.0, 1.0], (400, 1)) * 2.0**45
    found = numerics.fit_temperature(logits + shift, truth)
    assert numerics.fit_temperature(logits, truth) == pytest.approx(found, rel=1e-8)


@pytest.mark.parametrize("planted", [0.015, 70.0])
def test_fit_temperature_near_its_bounds_is_found(planted: float) -> None:
    """A temperature close to a bound is found like any other, and to the tolerance."""
    random = np.random.default_rng(10)
    logits = random.normal(0, 2, (2000, 3))
    truth = (numerics.softmax(logits).cumsum(axis=1) < random.random((2000, 1))).sum(axis=1)
    usual = numerics.fit_temperature(logits, truth)
    assert planted * usual == pytest.approx(numerics.fit_temperature(logits * planted, truth), rel=3e-9)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 100.0])
def test_answering_many_gives_the_bits_of_answering_one(temperature: float) -> None:
    """The quick way to probabilities and entropies is log_softmax and entropy to the bit, also where one is certain."""
    logits = np.random.default_rng(0).normal(0, 30, (500, 3)).astype(np.float32)
    logits[0], logits[1] = (3e38, -3e38, 0), (0, 0, 0)
    p, entropy = numerics.posterior(logits, temperature)
    np.testing.assert_array_equal(p, np.exp(numerics.log_softmax(logits, temperature)))
    np.testing.assert_array_equal(entropy, numerics.entropy(logits, temperature))
    assert not np.signbit(entropy).any()
