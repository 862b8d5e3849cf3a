import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model import numerics

FOUR_ENGINES = [[2, 0.5, -1], [0, 2, 0.3], [-1, 0.4, 3.8], [0.2, 0.5, 0.2]]
FOUR_LABELS = [0, 1, 2, 1]
rows = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-1e4, 1e4))
temperatures = st.floats(0.01, 100)


@given(rows, temperatures)
def test_softmax_is_a_distribution(logits: np.ndarray, t: float) -> None:
    """Softmax is not negative and sums to 1 for any logits and temperature."""
    p = numerics.softmax(logits, t)
    assert (p >= 0).all()
    np.testing.assert_allclose(1.0, p.sum(axis=1), atol=1e-12)


@given(rows, temperatures, st.floats(-1e4, 1e4))
def test_softmax_ignores_a_shift(logits: np.ndarray, t: float, shift: float) -> None:
    """Adding the same number to every logit changes the result by rounding errors only."""
    np.testing.assert_allclose(numerics.softmax(logits, t), numerics.softmax(logits + shift, t), atol=1e-7)


@given(rows, temperatures)
def test_temperature_keeps_the_order(logits: np.ndarray, t: float) -> None:
    """At any temperature, a more probable class remains at least as probable."""
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
def test_softmax_of_extreme_logits(logits: list[float], expected: list[float]) -> None:
    """Huge, equal, distant and single logits have the exact probabilities."""
    np.testing.assert_allclose(expected, numerics.softmax(logits), atol=1e-10)
    np.testing.assert_allclose(1.0, np.exp(numerics.log_softmax(logits)).sum())


def test_log_softmax_is_exact_where_softmax_underflows() -> None:
    """The logarithm of a probability below the smallest float is exact."""
    np.testing.assert_allclose([-2e4, 0], numerics.log_softmax([-1e4, 1e4]))


def test_softmax_agrees_with_torch() -> None:
    """Softmax and its logarithm equal torch's on 10,000 random rows."""
    logits = np.random.default_rng(0).normal(0, 10, (10_000, 3))
    np.testing.assert_allclose(torch.softmax(torch.tensor(logits), 1).numpy(), numerics.softmax(logits), rtol=1e-12)
    np.testing.assert_allclose(torch.log_softmax(torch.tensor(logits), 1), numerics.log_softmax(logits), rtol=1e-12)


def test_temperature_has_two_limits() -> None:
    """A high temperature approaches the uniform distribution, a low one certainty."""
    logits = [0.3, 0.1, -0.2]
    np.testing.assert_allclose([1 / 3] * 3, numerics.softmax(logits, 100), atol=2e-3)
    np.testing.assert_allclose([1, 0, 0], numerics.softmax(logits, 0.01), atol=1e-8)


@pytest.mark.parametrize("t", [0, -1, 0.009, 101, np.nan, np.inf])
def test_temperature_is_bounded(t: float) -> None:
    """A temperature outside 0.01..100 is an error."""
    with pytest.raises(ValueError, match="temperature"):
        numerics.softmax([1, 2], t)


def test_scaled_at_its_bounds_accepts() -> None:
    """The largest logits and both bounds of the temperature are accepted."""
    assert [1e150, -1e150] == numerics.scaled([1e150, -1e150]).tolist()
    assert [100.0, 0.01] == [float(numerics.scaled(1.0 * np.ones(1), t)[0]) for t in (0.01, 100)]


def test_scaled_rows_divides_each_row_by_its_temperature() -> None:
    """Each row is divided by its temperature, bounds included, or all rows by one temperature."""
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
    """Different lengths, logits that are not rows and temperatures out of bounds are errors."""
    with pytest.raises(ValueError, match=message):
        numerics.scaled_rows(logits, temperatures)  # type: ignore[arg-type]  # an invalid type, on purpose


@pytest.mark.parametrize("logits", [[np.nan, 1], [np.inf, 1], [1e200, 1], [], 3.0, [[]]])
def test_logits_must_be_finite_and_have_classes(logits: object) -> None:
    """Logits that are not finite or have no class are an error."""
    with pytest.raises(ValueError, match=r"^logits (must be finite|need at least one class)"):
        numerics.log_softmax(logits)  # type: ignore[arg-type]  # an invalid type, on purpose


def test_cross_entropy_at_certainty_uniform_and_error() -> None:
    """The loss is 0 at certainty, ln C at uniform, and large but finite for a confident error."""
    assert float(numerics.cross_entropy([[1e4, 0, 0]], [0])) == 0.0
    assert np.log(3) == pytest.approx(float(numerics.cross_entropy([[5, 5, 5]], [1])))
    assert [10.0, 100.0, 1e4] == pytest.approx(
        [float(numerics.cross_entropy([[z, 0]], [1])) for z in (10, 100, 1e4)], rel=1e-5
    )


@pytest.mark.parametrize(("p", "loss"), [(0.96, 0.041), (0.40, 0.916), (0.01, 4.605)])
def test_cross_entropy_of_a_probability(p: float, loss: float) -> None:
    """The loss of a true class of probability p is -ln p."""
    assert loss == pytest.approx(float(numerics.cross_entropy([[np.log(p), np.log(1 - p)]], [0])), abs=5e-4)


def test_cross_entropy_of_textbook_example() -> None:
    """Four engines and three classes have the losses of the textbook and the mean of torch."""
    losses = numerics.cross_entropy(FOUR_ENGINES, FOUR_LABELS, reduction="none")
    p = numerics.softmax(FOUR_ENGINES)
    assert (0.960, 0.403) == (round(float(p[2, 2]), 3), round(float(p[3, 1]), 3))
    assert (0.041, 0.909) == (round(float(losses[2]), 3), round(float(losses[3]), 3))
    expected = torch.nn.functional.cross_entropy(torch.tensor(FOUR_ENGINES), torch.tensor(FOUR_LABELS))
    assert 0.3668 == round(float(expected), 4) == round(float(numerics.cross_entropy(FOUR_ENGINES, FOUR_LABELS)), 4)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5], [0.0, 1.0, 3.0]])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_agrees_with_torch(weight: list[float] | None, soft: bool, reduction: numerics.Reduction) -> None:
    """The loss equals torch's on 10,000 random rows, with and without class weights, hard and soft."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 5, (10_000, 3))
    targets = random.dirichlet([1, 1, 1], 10_000) if soft else random.integers(0, 3, 10_000)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(targets), w, reduction=reduction)
    result = numerics.cross_entropy(logits, targets, class_weights=weight, reduction=reduction)
    np.testing.assert_allclose(expected.numpy(), result, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_loss_is_p_minus_y() -> None:
    """The gradient by the logits is the probability minus the label, as autograd computes it."""
    logits = torch.tensor(FOUR_ENGINES, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, torch.tensor(FOUR_LABELS), reduction="sum").backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad, numerics.softmax(FOUR_ENGINES) - np.eye(3)[FOUR_LABELS], atol=1e-12)


def test_index_and_one_hot_agree() -> None:
    """A class index and its one-hot distribution have the same loss."""
    hard = numerics.cross_entropy(FOUR_ENGINES, FOUR_LABELS, reduction="none")
    np.testing.assert_array_equal(hard, numerics.cross_entropy(FOUR_ENGINES, np.eye(3)[FOUR_LABELS], reduction="none"))


def test_million_classes_need_one_row_of_memory() -> None:
    """One label among a million classes allocates one row, not a square matrix."""
    row = numerics.as_distributions([7], 10**6)
    assert ((1, 10**6), 1.0, 1.0) == (row.shape, row[0, 7], row.sum())


@pytest.mark.parametrize("targets", [[3], [-1], [0.5], [[0.5, 0.2, 0.2]], [[1.5, -0.5, 0]], [[0.5, 0.5]], [0, 1]])
def test_targets_must_be_classes_or_distributions(targets: list[object]) -> None:
    """A target that is neither a class nor a distribution over the classes is an error."""
    with pytest.raises(ValueError, match=r"indices|distribution|targets"):
        numerics.cross_entropy([[1.0, 2.0, 3.0]], targets)  # type: ignore[arg-type]  # an invalid type, on purpose


@pytest.mark.parametrize("weights", [[1, 1], [1, -1, 1], [np.nan, 1, 1], [0, 0, 0]])
def test_invalid_class_weights_raise(weights: list[float]) -> None:
    """Class weights of another length, negative, not finite or all zero are an error."""
    with pytest.raises(ValueError, match="weight"):
        numerics.cross_entropy([[1.0, 2.0, 3.0]], [0], class_weights=weights)


def test_distribution_within_the_tolerance_is_accepted() -> None:
    """A distribution may sum to 0.9999 or 1.0001, also in one class; beyond, it is an error."""
    for row in ([1.0001, 0, 0], [0.5, 0.3, 0.1999], [0.5, 0.3, 0.2001]):
        np.testing.assert_array_equal([row], numerics.as_distributions([row], 3))
    for row in ([1.0002, 0, 0], [0.5, 0.3, 0.1998]):
        with pytest.raises(ValueError, match=r"^a distribution needs probabilities >= 0 that sum to 1$"):
            numerics.as_distributions([row], 3)


def test_class_index_out_of_range_raises() -> None:
    """An index outside of three classes is an error that names 2 as the largest index."""
    with pytest.raises(ValueError, match=r"^class indices must be from 0 to 2$"):
        numerics.as_distributions([3], 3)


def test_class_weights_at_their_bounds_are_accepted() -> None:
    """A class weight may be 0 or the maximum."""
    assert 1e9 * np.log(2) == pytest.approx(
        float(numerics.cross_entropy([[1.0, 1.0]], [1], class_weights=[0, numerics.MAX_WEIGHT], reduction="sum"))
    )


def test_mean_without_weight_raises() -> None:
    """The mean over classes whose weights are all 0 is an error; the sum is 0."""
    with pytest.raises(ValueError, match=r"^a mean needs at least one row whose class weight is above 0$"):
        numerics.cross_entropy([[1.0, 2.0]], [1], class_weights=[1, 0])
    assert 0.0 == float(numerics.cross_entropy([[1.0, 2.0]], [1], class_weights=[1, 0], reduction="sum"))


def test_one_row_equals_a_batch_of_one() -> None:
    """Logits of one row have the metrics of a batch of one, at temperature 1 by default."""
    row = [0.3, -1.0, 2.0]
    for measure in (numerics.entropy, numerics.loss_variance):
        assert float(measure(row)) == float(measure([row])[0]) == float(measure(row, 1.0))
        assert float(measure(row, 2.0)) == pytest.approx(float(measure(np.divide(row, 2))))
    assert numerics.brier(row, 1).tolist() == numerics.brier([row], [1], 1.0).tolist()


def test_probabilities_as_logits_bound_the_loss() -> None:
    """After a second softmax, the loss of three classes is at least 0.5514 even for a certain model."""
    certain = [[1.0, 0.0, 0.0]]
    assert 0.5514 == round(float(numerics.cross_entropy(certain, [0])), 4)
    assert 0.0 == float(numerics.cross_entropy(np.log(np.maximum(certain, 1e-300)), [0]))


@given(rows, temperatures)
def test_expected_loss_is_mean_over_all_labels(logits: np.ndarray, t: float) -> None:
    """Entropy and loss variance are mean and variance of the loss if labels follow the probabilities."""
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
    """Brier, reliability, ECE and its noise band at a temperature are those of divided logits; the default is 1."""
    random = np.random.default_rng(5)
    logits, labels = random.normal(0, 2, (200, 3)), random.integers(0, 3, 200)
    scaled = logits / temperature
    np.testing.assert_allclose(numerics.brier(scaled, labels), numerics.brier(logits, labels, temperature))
    assert numerics.ece(scaled, labels) == pytest.approx(numerics.ece(logits, labels, temperature))
    assert numerics.ece_noise_band(scaled) == pytest.approx(numerics.ece_noise_band(logits, temperature))
    divided, result = numerics.reliability(scaled, labels), numerics.reliability(logits, labels, temperature)
    np.testing.assert_allclose(divided.confidence, result.confidence)
    np.testing.assert_allclose(divided.count, result.count)


def test_reliability_has_requested_number_of_bins() -> None:
    """Counts, confidences and hits of a row are in the bin of its top probability, for any number of bins."""
    logits = np.log([[0.9, 0.1], [0.65, 0.35], [0.2, 0.8]])
    result = numerics.reliability(logits, [0, 1, 1], bins=10)
    assert [0] * 6 + [1, 1, 1, 0] == result.count.tolist()
    np.testing.assert_allclose([0] * 6 + [0.65, 0.8, 0.9, 0], result.confidence)
    assert [0] * 6 + [0, 1, 1, 0] == result.correct.tolist()
    assert (0.65 + 0.2 + 0.1) / 3 == pytest.approx(numerics.ece(logits, [0, 1, 1], bins=10))
    assert abs(2.35 - 2) / 3 == pytest.approx(numerics.ece(logits, [0, 1, 1], bins=1))


def test_ece_of_few_rows_is_divided_by_their_number() -> None:
    """One incorrect row of 0.9 has an ECE of 0.9; without rows ECE is 0."""
    assert 0.9 == pytest.approx(numerics.ece([np.log([0.9, 0.1])], [1]))
    assert 0.0 == numerics.ece(np.empty((0, 2)), np.empty(0, dtype=int))


def test_noise_band_defaults_are_200_draws_of_seed_0() -> None:
    """The default band has 200 draws of seed 0 in 15 bins; up to `coins` rows are simulated individually."""
    logits = np.random.default_rng(6).normal(0, 2, (500, 3))
    result = numerics.ece_noise_band(logits)
    assert result == numerics.ece_noise_band(logits, 1.0, draws=200, seed=0, bins=numerics.RELIABILITY_BINS, coins=500)
    for options in ({"draws": 201}, {"seed": 1}, {"bins": 3}, {"coins": 499}):
        assert result != numerics.ece_noise_band(logits, **options)


@pytest.mark.parametrize("coins", [0, 10**6])
def test_noise_band_of_one_confidence_is_normal(coins: int) -> None:
    """10,000 rows of 0.9 have an ECE of 0.003 times a standard normal, simulated individually or not."""
    logits = np.tile(np.log([0.9, 0.1]), (10_000, 1))
    low, high = numerics.ece_noise_band(logits, draws=4000 if coins else 40_000, coins=coins)
    assert 0.003 * 1.95996 == pytest.approx(high, rel=0.05)
    assert 0.003 * 0.06271 == pytest.approx(low, rel=0.3)


def test_noise_band_of_bins_equals_simulated_band() -> None:
    """The band from normal sums equals the simulated band, and depends on the number of bins."""
    logits = np.random.default_rng(7).normal(0, 2, (3000, 3))
    bands = {bins: numerics.ece_noise_band(logits, draws=2000, bins=bins, coins=0) for bins in (2, 15)}
    for bins, band in bands.items():
        assert band == pytest.approx(numerics.ece_noise_band(logits, draws=2000, bins=bins), rel=0.2)
    assert bands[15][0] > 1.5 * bands[2][0]


def test_noise_band_without_rows_is_zero() -> None:
    """Without rows the band is zero."""
    assert (0.0, 0.0) == numerics.ece_noise_band(np.empty((0, 3)))


def test_noise_band_of_one_row_is_its_two_errors() -> None:
    """One row of 0.7 has an error of 0.3 if it is correct and of 0.7 if not."""
    assert (0.3, 0.7) == pytest.approx(numerics.ece_noise_band([np.log([0.7, 0.3])]))


def test_reliability_bins_are_closed_above() -> None:
    """A confidence on the border of two bins belongs to the lower bin, and 1.0 to the last."""
    assert [0, 0, 1, 4, 14] == numerics.bin_of([0.0, 1 / 15, 1 / 15 + 1e-9, 5 / 15, 1.0]).tolist()


def test_ece_of_an_example() -> None:
    """Four predictions of 0.9 with three correct have an ECE of 0.15."""
    logits = np.tile(np.log([0.9, 0.1]), (4, 1))
    assert 0.15 == pytest.approx(numerics.ece(logits, [0, 0, 0, 1]))


def test_ece_of_a_calibrated_model_is_in_its_noise_band() -> None:
    """Labels drawn from the probabilities have an ECE inside the band in about 90 % of the cases."""
    random, inside = np.random.default_rng(2), 0
    for _ in range(100):
        logits = random.normal(0, 2, (300, 3))
        labels = (numerics.softmax(logits).cumsum(axis=1) < random.random((300, 1))).sum(axis=1)
        low, high = numerics.ece_noise_band(logits, draws=100)
        inside += low <= numerics.ece(logits, labels) <= high
    assert 80 <= inside <= 98


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 1.7, 4.0])
def test_fit_temperature_recovers_the_true_one(true_temperature: float) -> None:
    """The temperature from which 50,000 labels were drawn is recovered within 2 %."""
    random = np.random.default_rng(3)
    logits = random.normal(0, 3, (50_000, 3))
    labels = (numerics.softmax(logits, true_temperature).cumsum(axis=1) < random.random((50_000, 1))).sum(axis=1)
    assert true_temperature == pytest.approx(numerics.fit_temperature(logits, labels), rel=0.02)


def test_fit_temperature_never_raises_the_loss() -> None:
    """The fitted temperature has the lowest loss of all on the fitted rows."""
    random = np.random.default_rng(4)
    logits, labels = random.normal(0, 3, (500, 4)), random.integers(0, 4, 500)
    best = numerics.cross_entropy(logits, labels, numerics.fit_temperature(logits, labels))
    assert all(best <= numerics.cross_entropy(logits, labels, t) + 1e-12 for t in np.geomspace(0.01, 100, 200))


@pytest.mark.parametrize(
    ("logits", "targets", "expected"),
    [
        ([[5, 0], [0, 5]], [0, 1], 0.01),  # separable
        ([[5, 0], [0, 5]], [1, 0], 100.0),  # always wrong
        ([[1, 0, 0]], [0], 0.01),  # one row
        ([[50, 0], [0, 50]], [0, 1], 0.01),  # so certain that the slope is exactly 0
        ([[3], [4]], [0, 0], 1.0),  # one class: the loss does not depend on the temperature
        ([[2, 2], [7, 7]], [0, 1], 1.0),
    ],
)
def test_fit_temperature_is_bounded(logits: list[list[float]], targets: list[int], expected: float) -> None:
    """Without a finite optimum the result is the bound; if the loss is flat, it is 1."""
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
    """No rows, or only rows of weight 0, are an error."""
    with pytest.raises(ValueError, match=r"^a temperature needs rows"):
        numerics.fit_temperature(logits, np.array(targets, dtype=int), weights)  # type: ignore[arg-type]  # empty array


def test_fit_temperature_weight_repeats_row() -> None:
    """A weight of 2 repeats the row, a weight of 0 removes it, and only ratios of weights matter."""
    random = np.random.default_rng(8)
    logits, labels, weights = random.normal(0, 2, (300, 3)), random.integers(0, 3, 300), random.integers(0, 4, 300)
    labels[:200] = logits[:200].argmax(axis=1)
    expected = numerics.fit_temperature(np.repeat(logits, weights, axis=0), np.repeat(labels, weights))
    assert expected != pytest.approx(numerics.fit_temperature(logits, labels), rel=0.01)
    for scale in (1, 0.25, 1e-9, 1e9):
        assert expected == pytest.approx(numerics.fit_temperature(logits, labels, weights * scale), rel=1e-6)
    large = np.where(weights > 1, 3e38, 0).astype(np.float32)  # their sum overflows float32
    assert numerics.fit_temperature(logits, labels, weights > 1) == pytest.approx(
        numerics.fit_temperature(logits, labels, large), rel=1e-6
    )
    for targets, bound in (([0, 1], 0.01), ([1, 0], 100.0)):
        assert bound == numerics.fit_temperature([[5, 0], [0, 5]], targets, [1e-6, 1e-6])


def test_fit_temperature_ignores_a_shift_of_each_row() -> None:
    """Rows shifted by different large distances have the temperature of the rows near zero."""
    random = np.random.default_rng(9)
    logits, labels = random.integers(-8, 9, (400, 3)) / 4, random.integers(0, 3, 400)
    labels[:250] = logits[:250].argmax(axis=1)
    shift = random.choice([-1.0, 0.0, 1.0], (400, 1)) * 2.0**45
    result = numerics.fit_temperature(logits + shift, labels)
    assert numerics.fit_temperature(logits, labels) == pytest.approx(result, rel=1e-8)


@pytest.mark.parametrize("true_temperature", [0.015, 70.0])
def test_fit_temperature_near_its_bounds_is_found(true_temperature: float) -> None:
    """A temperature close to a bound is recovered to the tolerance."""
    random = np.random.default_rng(10)
    logits = random.normal(0, 2, (2000, 3))
    labels = (numerics.softmax(logits).cumsum(axis=1) < random.random((2000, 1))).sum(axis=1)
    usual = numerics.fit_temperature(logits, labels)
    assert true_temperature * usual == pytest.approx(
        numerics.fit_temperature(logits * true_temperature, labels), rel=3e-9
    )


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 100.0])
def test_posterior_has_the_bits_of_log_softmax(temperature: float) -> None:
    """`posterior` equals log_softmax and entropy to the bit, also at certainty."""
    logits = np.random.default_rng(0).normal(0, 30, (500, 3)).astype(np.float32)
    logits[0], logits[1] = (3e38, -3e38, 0), (0, 0, 0)
    p, entropy = numerics.posterior(logits, temperature)
    np.testing.assert_array_equal(p, np.exp(numerics.log_softmax(logits, temperature)))
    np.testing.assert_array_equal(entropy, numerics.entropy(logits, temperature))
    assert not np.signbit(entropy).any()
