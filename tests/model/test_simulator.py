from pathlib import Path

import numpy as np
import pytest

from model.contract import CHANNELS, SENSORS, Manifest
from model.data import cmapss
from model.data.simulator import fleet as simulate
from model.data.simulator import statistics as fleet
from model.data.simulator.drift_injection import DriftError, DriftInjector, parse_drift
from model.data.simulator.fit import SUBSET, estimate_statistics
from model.data.simulator.fleet import SimulatedEngine
from model.data.simulator.statistics import SETTING_COUNT, Floats
from model.evaluation.drift import count_bins, psi
from model.evaluation.evaluate import ARTEFACT, onnx_runner, open_artefact, predict_histories
from model.evaluation.evaluation_metrics import concatenate_rows, macro_f1

ENGINES = 200
WITHIN = 0.10


def rows_of_all(engines: list[cmapss.History]) -> Floats:
    return np.concatenate([engine.telemetry for engine in engines]).astype(np.float64)


@pytest.fixture(scope="module")
def simulated() -> list[cmapss.History]:
    return list(simulate.simulate_histories(ENGINES, seed=1))


@pytest.fixture(scope="module")
def subsets(cmapss_dir: Path) -> dict[str, list[cmapss.History]]:
    return {name: cmapss.read_train(cmapss_dir, name) for name in cmapss.SUBSETS}


@pytest.fixture(scope="module")
def real(subsets: dict[str, list[cmapss.History]]) -> list[cmapss.History]:
    return subsets[SUBSET]


@pytest.mark.slow
def test_macro_f1_on_simulated_engines(simulated: list[cmapss.History], manifest: Manifest) -> None:
    """On every cycle of 200 simulated lives, macro-F1 is at least 0.80; on official training lives it is 0.87."""
    run = onnx_runner(open_artefact(ARTEFACT)[0])
    result = concatenate_rows(predict_histories(run, manifest.window or 1, simulated), last_only=False)
    assert macro_f1(result.logits.argmax(axis=1), result.labels, 3) >= 0.80


def test_channels_have_real_means_and_deviations(real: list[cmapss.History], simulated: list[cmapss.History]) -> None:
    """Each channel's mean is within a tenth of its real deviation, and its deviation within 10 %.

    A tenth of the deviation is stricter than 10 % of the mean: most means are hundreds of deviations.
    """
    expected, result = rows_of_all(real), rows_of_all(simulated)
    deviation = expected.std(axis=0)
    np.testing.assert_array_less(abs(result.mean(axis=0) - expected.mean(axis=0)), WITHIN * deviation)
    np.testing.assert_allclose(deviation, result.std(axis=0), rtol=WITHIN)


def test_conditions_have_real_means_and_deviations(real: list[cmapss.History], simulated: list[cmapss.History]) -> None:
    """The same is true within each operating condition.

    A channel that is constant in a condition (the throttle) must be that constant. Others may differ by a tenth of
    their deviation, or by half of their last decimal.
    """
    statistics = fleet.read_statistics()
    expected, result = rows_of_all(real), rows_of_all(simulated)
    step = 10.0**-statistics.decimals
    conditions = [statistics.nearest_conditions(rows[:, :SETTING_COUNT]) for rows in (expected, result)]
    for k in range(len(statistics.shares)):
        real_rows, simulated_rows = expected[conditions[0] == k], result[conditions[1] == k]
        slack = np.where(real_rows.std(axis=0) > 0, np.maximum(WITHIN * real_rows.std(axis=0), step / 2), 1e-9)
        assert (abs(simulated_rows.mean(axis=0) - real_rows.mean(axis=0)) <= slack).all()
        assert (abs(simulated_rows.std(axis=0) - real_rows.std(axis=0)) <= slack).all()
        assert len(simulated_rows) / len(result) == pytest.approx(statistics.shares[k], abs=0.01)


def test_committed_statistics_are_reproducible(subsets: dict[str, list[cmapss.History]], tmp_path: Path) -> None:
    """The training data give the committed statistics again, to their digits."""
    fleet.write_statistics(estimate_statistics(subsets), "here", tmp_path / "fleet.json")
    again, committed = fleet.read_statistics(tmp_path / "fleet.json"), fleet.read_statistics()
    for name in (
        "baseline",
        "response",
        "noise",
        "deviation",
        "shares",
        "decimals",
        "mixing",
        "grounded",
        "grounded_high",
    ):
        np.testing.assert_allclose(getattr(committed, name), getattr(again, name), rtol=1e-4, atol=1e-6)
    for mode, other in zip(committed.modes, again.modes, strict=True):
        np.testing.assert_allclose(mode.mean, other.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(abs(mode.factors), abs(other.factors), rtol=1e-3, atol=1e-5)  # of either sign


def test_seed_and_number_determine_an_engine() -> None:
    """Equal seeds and numbers give the same bits, in one call or one flight per call; other seeds differ."""
    whole, single = SimulatedEngine(3, seed=7).fly(400), SimulatedEngine(3, seed=7)
    rows = []
    while not single.failed:
        rows.append(single.fly()[0])
    np.testing.assert_array_equal(whole, np.stack(rows))
    assert (0, len(CHANNELS)) == single.fly().shape
    assert not np.array_equal(whole[:100], SimulatedEngine(3, seed=8).fly(100))


def test_simulated_lives_end_at_rul_zero(simulated: list[cmapss.History]) -> None:
    """RUL falls by 1 per cycle to 0; both wear modes and all lengths of life of the training data exist."""
    lengths = [len(engine.cycle) for engine in simulated]
    assert min(lengths) >= fleet.read_statistics().shortest
    assert max(lengths) <= fleet.read_statistics().longest
    assert np.mean(lengths) == pytest.approx(246, rel=0.07)
    for engine in simulated[:20]:
        np.testing.assert_array_equal(np.arange(len(engine.cycle))[::-1], engine.require_rul())
    assert {"HPC", "fan"} == {SimulatedEngine(number, seed=1).mode.name for number in range(20)}


def test_mixed_fleet_matches_the_drift_reference(manifest: Manifest) -> None:
    """Live histories of a mixed fleet have a PSI of at most 0.15 in every channel."""
    assert manifest.reference is not None
    telemetry = np.concatenate(
        [engine.telemetry[:-60] for engine in simulate.simulate_histories(ENGINES, 1, mixed=True)]
    )
    for k, name in enumerate(manifest.channel_names):
        bins = manifest.reference.channels[name]
        counts = count_bins(telemetry[:, k].astype(np.float64), bins)
        assert psi(np.array(bins.shares), counts.astype(np.float64)) < 0.15, name


def test_faster_wear_shortens_lives() -> None:
    """An engine with double wear makes half of the flights and reaches the same wear."""
    usual, fast = SimulatedEngine(0), SimulatedEngine(0)
    life, half = usual.fly(1000), fast.fly(1000, wear_rate=2.0)
    assert -(-len(life) // 2) == len(half)
    assert usual.failed
    assert fast.failed


def test_injected_drift_changes_its_channels(simulated: list[cmapss.History]) -> None:
    """A bias shifts one sensor, noise widens it, a new condition changes settings; earlier flights are unchanged."""
    rows, k = np.concatenate([engine.telemetry for engine in simulated[:8]]), SENSORS.index("sensor_11")
    statistics, column = fleet.read_statistics(), SETTING_COUNT + SENSORS.index("sensor_11")

    def injected_change(text: str) -> Floats:
        injector = DriftInjector([parse_drift(text)])
        result = [injector.inject(row, i, (0, i)) - row.astype(np.float64) for i, row in enumerate(rows)]
        return np.array(result)

    condition = statistics.nearest_conditions(rows[:, :SETTING_COUNT])
    bias = injected_change("sensor_11:+2sd@600")
    assert not bias[:600].any()
    np.testing.assert_allclose(2 * statistics.deviation[condition, k][600:], bias[600:, column], atol=0.006)
    assert not np.delete(bias, column, axis=1).any()
    np.testing.assert_allclose(-0.5, injected_change("sensor_11:-0.5")[:, column], atol=0.006)
    noise = injected_change("sensor_11:x3noise")[:, column] / statistics.noise[condition, k]
    assert np.sqrt(8) == pytest.approx(noise.std(), rel=0.1)
    assert 0.2 == pytest.approx((injected_change("condition:20%")[:, 0] != 0).mean(), abs=0.03)
    assert [1.0, 2.0] == [DriftInjector([parse_drift("wear:x2@600")]).wear_rate(flight) for flight in (599, 600)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sensor_11", "invalid drift"),
        ("sensor_11:2sd", "invalid drift"),
        ("sensor_11:+2sd@x", "invalid drift"),
        ("sensor_1:+2sd", "sensor_1 is not an input"),
        ("sensors:x0.5noise", "from 1"),
        ("condition:120%", "to 100"),
        ("wear:x0", "from 0.01"),
        ("sensor_11:+1e9", "invalid drift"),
    ],
)
def test_invalid_drift_raises(text: str, message: str) -> None:
    """An invalid drift is an error of one line."""
    with pytest.raises(DriftError, match=message) as error:
        parse_drift(text)
    assert "\n" not in str(error.value)
