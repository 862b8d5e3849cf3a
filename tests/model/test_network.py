from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data import cmapss
from model.data.cmapss import History
from model.training.backbones import RollingMlp, WindowRows, observed_rows
from model.training.calibrate import calibrate_checkpoint
from model.training.cross_fit import load_checkpoint, train_checkpoint
from model.training.losses import balanced_weights, bin_loss, health_loss, rul_loss, weighted_mean
from model.training.network import EngineHealth, NetworkConfig, bin_edges, find_conditions
from model.training.train import (
    TrainingConfig,
    add_noise,
    build_network,
    build_windows,
    drop_rows,
    late_start,
    predict_windows,
    sample_batches,
    train_network,
)
from model.windows import every_window

QUICK = TrainingConfig(window=20, hidden=8, epochs=1, windows_per_epoch=600, batch=64, folds=2, seed=3)


@pytest.fixture(scope="module")
def fleet(cmapss_dir: Path) -> list[list[History]]:
    """Twelve official engines of two subsets: one with a single operating condition, one with six."""
    return [cmapss.read_train(cmapss_dir, "FD001")[:12], cmapss.read_train(cmapss_dir, "FD002")[:12]]


def test_operating_conditions_are_found(fleet: list[list[History]]) -> None:
    """Six operating conditions are found without a configured number, and one condition where there is one."""
    single, six = (np.concatenate([h.telemetry[:, :3] for h in subset]) for subset in fleet)
    assert 1 == len(find_conditions(single)[0])
    centres, condition = find_conditions(six)
    np.testing.assert_allclose([0, 10, 20, 25, 35, 42], centres[:, 0], atol=0.05)
    assert {0, 1, 2, 3, 4, 5} == set(condition.tolist())


def test_normalised_sensors_have_mean_0_and_deviation_1(fleet: list[list[History]]) -> None:
    """Normalised training rows have mean 0 and deviation 1 in every operating condition."""
    engines = [history for subset in fleet for history in subset]
    rows = np.concatenate([history.telemetry for history in engines])
    with torch.inference_mode():
        normalised_rows = build_network(engines, QUICK).normalise(torch.from_numpy(rows[None]))
    sensors = normalised_rows.normalised[0].numpy()
    assert float(normalised_rows.valid.mean()) > 0.99
    _, condition = find_conditions(rows[:, :3])
    for k in range(6):
        np.testing.assert_allclose(0, sensors[condition == k].mean(axis=0), atol=0.02)
        spread = sensors[condition == k].std(axis=0)
        assert ((np.abs(spread - 1) < 0.05) | (spread < 1e-3)).all()


def test_sensor_out_of_range_is_invalid(fleet: list[list[History]]) -> None:
    """A reading beyond the range of wear is replaced by the baseline and marked as invalid."""
    network, row = build_network(fleet[1], QUICK), torch.from_numpy(fleet[1][0].telemetry[None, :20].copy())
    row[:, :, 5] = 1e30
    normalised_rows = network.normalise(row)
    assert (0.0, 0.0) == (
        float(normalised_rows.normalised[..., 2].abs().max()),
        float(normalised_rows.valid[..., 2].max()),
    )
    assert 0.0 < float(normalised_rows.normalised[..., 3].abs().max())
    assert 1.0 == float(normalised_rows.valid[..., 3:].mean())


def test_frozen_sensor_is_invalid(fleet: list[list[History]]) -> None:
    """Of five or more equal readings in a row, the first is valid and the others are frozen."""
    network, row = build_network(fleet[0], QUICK), torch.from_numpy(fleet[0][0].telemetry[None, :20].copy())
    row[:, 10:, 5] = row[:, 9, None, 5]
    row[:, 5:9, 6] = row[:, 5, None, 6]
    valid = network.normalise(row).valid[0]
    torch.testing.assert_close(torch.tensor([1.0] * 10 + [0.0] * 10), valid[:, 2])
    torch.testing.assert_close(torch.ones(20), valid[:, 3])


def test_rows_of_unknown_condition_are_invalid(fleet: list[list[History]]) -> None:
    """Rows of a condition outside the training data are invalid; without valid rows, outputs are equal."""
    network = build_network(fleet[1], QUICK).eval()
    first, second = (torch.from_numpy(history.telemetry[None, -20:].copy()) for history in fleet[1][:2])
    with torch.inference_mode():
        for window in (first, second):
            window[:, :, 0] += 5.0  # kft
            assert 0.0 == float(network.normalise(window).valid.max())
        torch.testing.assert_close(network(first), network(second))
        first[:, ::2, 0] -= 5.0
        assert 0.5 == float(network.normalise(first).valid.mean())


def test_extreme_settings_do_not_overflow(fleet: list[list[History]]) -> None:
    """The largest floats as settings are an unknown condition."""
    network = build_network(fleet[1], QUICK)
    window = torch.full((1, 20, 17), 3e38)
    window[:, ::2] *= -1
    normalised_rows = network.normalise(window)
    assert (0.0, 0.0) == (float(normalised_rows.normalised.abs().max()), float(normalised_rows.valid.max()))


def test_padding_is_recognised() -> None:
    """Copies of the oldest row in front of it are padding; the oldest row and later equal rows are not."""
    rows = torch.randn(1, 6, 17)
    rows[0, :3] = rows[0, 3]
    torch.testing.assert_close(torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), observed_rows(rows))
    rows[0, 5] = rows[0, 4]
    torch.testing.assert_close(torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), observed_rows(rows))
    torch.testing.assert_close(
        torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]), observed_rows(rows[:, :1].expand(1, 6, 17))
    )


def test_rolling_means_ignore_invalid_readings() -> None:
    """Each span has the mean of its newest valid readings, else that of the next longer span, else zero."""
    backbone, x, ones = RollingMlp(6, 2, 8, 0.0), torch.arange(12.0).reshape(1, 6, 2), torch.ones(1, 6)
    valid = torch.ones(1, 6, 2)
    whole = backbone.features(WindowRows(x, valid, ones))[0]
    expected = torch.stack([x[0, -n:].mean(0) for n in (1, 3, 5, 6)]).flatten()
    torch.testing.assert_close(torch.cat([expected, torch.ones(2)]), whole)
    late = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]])
    short = backbone.features(WindowRows(x, valid * late[..., None], late))[0]
    torch.testing.assert_close(x[0, -2:].mean(0), short[6:8])
    assert 2 * np.log(3) / np.log(7) - 1 == pytest.approx(float(short[-2]))
    assert 1.0 == float(short[-1])
    valid[0, 1:, 0] = 0
    held = backbone.features(WindowRows(x, valid, ones))[0]
    torch.testing.assert_close(x[0, 0, 0].expand(4), held[[0, 2, 4, 6]])  # only the longest span has valid readings
    assert 0.0 == float(backbone.features(WindowRows(x, valid * 0, ones))[0, :8].abs().max())


def test_training_windows_equal_serving_windows(fleet: list[list[History]]) -> None:
    """Windows gathered from normalised rows have the outputs of the raw windows, padding included."""
    engines = fleet[1][:2]
    network = build_network(engines, QUICK).eval()
    raw = np.concatenate([every_window(history.telemetry, 20) for history in engines])
    with torch.inference_mode():
        logits, rul = network(torch.from_numpy(raw))
    answer = predict_windows(network, build_windows(engines, network))
    torch.testing.assert_close(logits, answer.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(rul, answer.rul, rtol=0, atol=1e-3)


def test_network_returns_logits_and_rul() -> None:
    """Logits are (B, 3) of any sign, RUL is (B,) from 0 to 125."""
    network = EngineHealth(NetworkConfig()).eval()
    with torch.inference_mode():
        logits, rul = network(torch.randn(7, 100, 17) * 1000)
    assert (7, 3) == tuple(logits.shape)
    assert (7,) == tuple(rul.shape)
    assert 0 <= float(rul.min()) <= float(rul.max()) <= 125


def test_health_loss_equals_published_formulas() -> None:
    """The default loss equals torch's; the focal factor and class weights multiply it as published."""
    logits, labels = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(plain, health_loss(logits, labels))
    p = torch.softmax(logits, 1)[torch.arange(50), labels]
    torch.testing.assert_close((1 - p) ** 2 * plain, health_loss(logits, labels, focal_gamma=2.0))
    weights = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(weights[labels] * plain, health_loss(logits, labels, weights))


def test_balanced_weights_give_classes_equal_weight() -> None:
    """Each class has the same total weight, and the weights of a balanced data set are 1."""
    counts = torch.tensor([10.0, 30.0, 60.0])
    torch.testing.assert_close(torch.full((3,), 100 / 3), balanced_weights(counts) * counts)
    torch.testing.assert_close(torch.ones(2), balanced_weights(torch.tensor([5.0, 5.0])))


def test_rul_loss_caps_the_true_rul() -> None:
    """A prediction of 125 for an engine with 300 cycles left has no loss; errors are in units of 125."""
    torch.testing.assert_close(
        torch.tensor([0.0, 1.0]), rul_loss(torch.tensor([125.0, 125.0]), torch.tensor([300.0, 0.0]))
    )
    assert 2.5 == float(weighted_mean(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0])))


def test_epoch_samples_rows_like_a_live_fleet(fleet: list[list[History]]) -> None:
    """Rows near failure are sampled as rarely as random cut-offs keep them."""
    windows = build_windows(fleet[0], build_network(fleet[0], QUICK))
    config = replace(QUICK, windows_per_epoch=len(windows.first), batch=500)
    drawn = torch.cat(
        [torch.cat(list(sample_batches(windows, config, torch.Generator().manual_seed(i)))) for i in range(40)]
    )
    share = (windows.label[drawn] == 2).float().mean()
    expected = weighted_mean((windows.label == 2).float(), windows.weight)
    assert float(expected) == pytest.approx(float(share), rel=0.1)


def test_add_noise_adds_noise_bias_and_missing_sensors() -> None:
    """Bias is constant within a window, noise is not; half of the missing sensors are missing throughout."""
    generator, still = torch.Generator().manual_seed(0), replace(QUICK, noise=0.0, bias=0.0, channel_dropout=0.0)
    rows = WindowRows(torch.zeros(2000, 5, 3), torch.ones(2000, 5, 3), torch.ones(2000, 5))
    bias = add_noise(rows, replace(still, bias=0.5), generator).normalised
    assert 0.0 == float((bias - bias[:, :1]).abs().max())
    assert 0.5 == pytest.approx(float(bias[:, 0].std()), rel=0.05)
    noise = add_noise(rows, replace(still, noise=0.2), generator).normalised
    assert 0.2 == pytest.approx(float(noise.std()), rel=0.05)
    silent = add_noise(rows, replace(still, channel_dropout=0.4), generator).valid == 0
    assert bool((silent[:, 1:] >= silent[:, :-1]).all())
    assert 0.4 == pytest.approx(float(silent[:, -1].float().mean()), abs=0.03)
    assert 0.24 == pytest.approx(float(silent[:, 0].float().mean()), abs=0.03)


def test_add_noise_leaves_settings_unchanged() -> None:
    """Only sensors get noise if the backbone also reads settings."""
    rows = WindowRows(torch.zeros(3, 9, 17), torch.ones(3, 9, 14), torch.ones(3, 9))
    values = add_noise(rows, QUICK, torch.Generator().manual_seed(0)).normalised
    assert not values[..., :3].any()
    assert values[..., 3:].any()


@pytest.mark.parametrize("thresholds", [(125.0, 50.0), (80.0, 30.0), (100.0,)])
def test_classes_are_masses_of_the_rul_distribution(thresholds: tuple[float, ...]) -> None:
    """Class probabilities are sums of bin probabilities between thresholds, and RUL is their mean."""
    network = EngineHealth(NetworkConfig(window=20, thresholds=thresholds)).eval()
    with torch.inference_mode():
        answer = network.predict_rows(WindowRows(torch.randn(9, 20, 14), torch.ones(9, 20, 14), torch.ones(9, 20)))
    assert answer.bins is not None
    p, ends = answer.bins.exp(), torch.cat([bin_edges(network.config), torch.tensor([1000.0])])
    labels = torch.from_numpy(cmapss.health_classes(ends.numpy(), thresholds))
    expected = torch.stack([p[:, labels == k].sum(1) for k in range(len(thresholds) + 1)], dim=1)
    torch.testing.assert_close(expected, torch.softmax(answer.logits, dim=1))
    torch.testing.assert_close(p @ torch.cat([torch.arange(2.5, 125, 5), torch.tensor([125.0])]), answer.rul)


def test_threshold_inside_a_bin_raises() -> None:
    """A threshold inside a bin of the distribution or beyond its last bin is an error."""
    for thresholds in ((125.0, 52.0), (130.0, 50.0), (125.0, 0.0)):
        with pytest.raises(ValueError, match="multiples of 5"):
            EngineHealth(NetworkConfig(thresholds=thresholds))


def test_bin_loss_is_likelihood_of_true_bin() -> None:
    """A RUL on the edge of two bins belongs to the lower bin; one beyond the cap to the open bin."""
    log_p = torch.log_softmax(torch.randn(4, 26, generator=torch.Generator().manual_seed(0)), dim=1)
    edges = bin_edges(NetworkConfig())
    values = bin_loss(log_p, torch.tensor([0.0, 5.0, 5.5, 300.0]), edges)
    torch.testing.assert_close(-log_p[[0, 1, 2, 3], [0, 0, 1, 25]], values)


def test_cnn_bilstm_has_3497476_parameters() -> None:
    """With 17 inputs and width 256, the CNN-BiLSTM has over 30 times the parameters of the compact network."""

    def parameters(config: NetworkConfig) -> int:
        return sum(weight.numel() for weight in EngineHealth(config).parameters())

    textbook = NetworkConfig(window=30, backbone="cnn-bilstm-attention", hidden=256)
    assert 3_497_476 == parameters(textbook) > 30 * parameters(NetworkConfig())


def test_cnn_bilstm_reads_settings_and_sensors() -> None:
    """Its 17 inputs are scaled settings and normalised sensors; it returns logits and RUL."""
    network = EngineHealth(NetworkConfig(window=30, backbone="cnn-bilstm-attention", hidden=16)).eval()
    flight = torch.tensor([42.0, 0.84, 100.0, *[0.0] * 14]).expand(2, 30, 17)
    with torch.inference_mode():
        assert (2, 30, 17) == tuple(network.normalise(flight)[0].shape)
        assert 1.0 == pytest.approx(float(network.normalise(flight)[0][0, 0, 0]), abs=0.05)
        logits, rul = network(flight)
    assert ((2, 3), (2,)) == (tuple(logits.shape), tuple(rul.shape))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in processes that it forks
def test_training_is_repeatable_and_holds_out_engines(
    fleet: list[list[History]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Equal seeds give equal networks, and each engine is predicted by a network not trained on it."""
    first, second = train_checkpoint(fleet, QUICK), train_checkpoint(fleet, QUICK)
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], rtol=0, atol=0)
    assert sum(len(h.cycle) for subset in fleet for h in subset) == len(first["held_out"]["logits"])
    assert "fold 2" in capfd.readouterr().out
    torch.save(first, tmp_path / "c.pt")
    network, checkpoint = load_checkpoint(tmp_path / "c.pt")
    assert not network.training
    assert QUICK.seed == checkpoint["knobs"]["seed"]
    assert {"shipped": [24, 0], "fold 1": [12, 12], "fold 2": [12, 12]} == checkpoint["split"]


def test_training_lowers_loss_on_held_out_engines(
    fleet: list[list[History]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A few epochs on nine engines lower the loss of three others; one line per epoch shows the progress."""
    config = replace(QUICK, epochs=6, average=0.9, windows_per_epoch=2000)
    network = build_network(fleet[0][:9], config)
    learn, check = build_windows(fleet[0][:9], network), build_windows(fleet[0][9:], network)

    def loss() -> float:
        return float(weighted_mean(health_loss(predict_windows(network, check).logits, check.label), check.weight))

    untrained = loss()
    train_network(network, learn, config, "test")
    assert loss() < 0.8 * untrained
    assert not network.training
    assert 6 == len(capsys.readouterr().out.splitlines())


def test_late_start_and_dropped_rows_are_invalid() -> None:
    """A shortened window is padded with its oldest remaining row; a dropped row is invalid but keeps its place."""
    generator, normal = torch.Generator().manual_seed(0), torch.randn(400, 20, 14)
    rows = WindowRows(normal, torch.ones(400, 20, 14), torch.ones(400, 20))
    cut = late_start(rows, replace(QUICK, late_start=1.0), generator)
    begins = (cut.observed == 0).sum(1)
    assert {0, 19} <= set(begins.tolist())
    for k in range(50):
        torch.testing.assert_close(normal[k, begins[k] :], cut.normalised[k, begins[k] :])
        torch.testing.assert_close(
            cut.normalised[k, begins[k]].expand(int(begins[k]), 14), cut.normalised[k, : begins[k]]
        )
    torch.testing.assert_close(cut.observed.unsqueeze(-1).expand_as(cut.valid), cut.valid)
    dropped = drop_rows(rows, replace(QUICK, unknown_rows=0.5), generator)
    share = dropped.valid.mean((1, 2))
    assert 0.73 == pytest.approx(float(share.mean()), abs=0.05)
    assert float((share == 0).float().mean()) > 0.01
    assert bool((dropped.observed == 1).all())


def test_invalid_training_config_raises() -> None:
    """One fold, thresholds that do not decrease, and zero epochs are errors."""
    for invalid in ({"folds": 1}, {"near_threshold": 130.0}, {"epochs": 0}):
        with pytest.raises(ValueError, match=r"folds|thresholds|at least 1"):
            TrainingConfig(**invalid)


def test_calibration_without_folds_raises(fleet: list[list[History]]) -> None:
    """Training without folds returns a network without held-out outputs, which cannot be calibrated."""
    checkpoint = train_checkpoint([fleet[0][:3]], replace(QUICK, folds=0))
    assert {"shipped": [3, 0]} == checkpoint["split"]
    with pytest.raises(cmapss.DataError, match="folds"):
        calibrate_checkpoint(checkpoint, np.zeros((1, 17)))
