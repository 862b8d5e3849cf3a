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
def test_the_committed_model_finds_simulated_engines_plausible(
    simulated: list[cmapss.History], manifest: Manifest
) -> None:
    """On every cycle of two hundred simulated lives, macro-F1 is at least 0.80; on real training lives it is 0.87."""
    run = onnx_runner(open_artefact(ARTEFACT)[0])
    found = concatenate_rows(predict_histories(run, manifest.window or 1, simulated), last_only=False)
    assert macro_f1(found.logits.argmax(axis=1), found.labels, 3) >= 0.80


def test_channels_have_the_means_and_deviations_of_real_ones(
    real: list[cmapss.History], simulated: list[cmapss.History]
) -> None:
    """Of all flights, each channel's mean is within a tenth of its real deviation, and its deviation within 10 %.

    A tenth of the deviation is the stricter reading of "within 10 %": most channels' means are hundreds of deviations.
    """
    expected, found = rows_of_all(real), rows_of_all(simulated)
    deviation = expected.std(axis=0)
    np.testing.assert_array_less(abs(found.mean(axis=0) - expected.mean(axis=0)), WITHIN * deviation)
    np.testing.assert_allclose(deviation, found.std(axis=0), rtol=WITHIN)


def test_so_they_have_in_each_operating_condition(real: list[cmapss.History], simulated: list[cmapss.History]) -> None:
    """The same holds within each condition, where channels are near-constant and conditions hide nothing.

    A channel that a condition holds constant (the throttle) must be that constant; others may be off by a tenth of
    their deviation, but by less than the last decimal that they are written with nobody could tell.
    """
    statistics = fleet.read_statistics()
    expected, found = rows_of_all(real), rows_of_all(simulated)
    step = 10.0**-statistics.decimals
    conditions = [statistics.nearest_conditions(rows[:, :SETTING_COUNT]) for rows in (expected, found)]
    for k in range(len(statistics.shares)):
        of, like = expected[conditions[0] == k], found[conditions[1] == k]
        slack = np.where(of.std(axis=0) > 0, np.maximum(WITHIN * of.std(axis=0), step / 2), 1e-9)
        assert (abs(like.mean(axis=0) - of.mean(axis=0)) <= slack).all()
        assert (abs(like.std(axis=0) - of.std(axis=0)) <= slack).all()
        assert len(like) / len(found) == pytest.approx(statistics.shares[k], abs=0.01)


def test_the_table_is_what_its_code_estimates(subsets: dict[str, list[cmapss.History]], tmp_path: Path) -> None:
    """The committed statistics come out of the training data again, to the digits that are kept."""
    fleet.write_statistics(estimate_statistics(subsets), "here", tmp_path / "fleet.json")
    again, kept = fleet.read_statistics(tmp_path / "fleet.json"), fleet.read_statistics()
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
        np.testing.assert_allclose(getattr(kept, name), getattr(again, name), rtol=1e-4, atol=1e-6)
    for mode, other in zip(kept.modes, again.modes, strict=True):
        np.testing.assert_allclose(mode.mean, other.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(abs(mode.factors), abs(other.factors), rtol=1e-3, atol=1e-5)  # of either sign


def test_a_seed_is_a_fleet() -> None:
    """Same seed and number: the same engine, bit for bit, one flight at a time or all at once; others differ."""
    whole, single = SimulatedEngine(3, seed=7).fly(400), SimulatedEngine(3, seed=7)
    rows = []
    while not single.failed:
        rows.append(single.fly()[0])
    np.testing.assert_array_equal(whole, np.stack(rows))
    assert (0, len(CHANNELS)) == single.fly().shape
    assert not np.array_equal(whole[:100], SimulatedEngine(3, seed=8).fly(100))


def test_lives_end_where_rul_does(simulated: list[cmapss.History]) -> None:
    """RUL falls by one a cycle to 0 at the last; both modes and all lengths of life that training has are there."""
    lengths = [len(engine.cycle) for engine in simulated]
    assert min(lengths) >= fleet.read_statistics().shortest
    assert max(lengths) <= fleet.read_statistics().longest
    assert np.mean(lengths) == pytest.approx(246, rel=0.07)
    for engine in simulated[:20]:
        np.testing.assert_array_equal(np.arange(len(engine.cycle))[::-1], engine.require_rul())
    assert {"HPC", "fan"} == {SimulatedEngine(number, seed=1).mode.name for number in range(20)}


def test_a_mixed_fleet_reads_as_the_reference_of_drift_does(manifest: Manifest) -> None:
    """Live histories of a mixed fleet are near the manifest's reference: no channel's PSI is above 0.15."""
    assert manifest.reference is not None
    seen = np.concatenate([engine.telemetry[:-60] for engine in simulate.simulate_histories(ENGINES, 1, mixed=True)])
    for k, name in enumerate(manifest.channel_names):
        bins = manifest.reference.channels[name]
        counts = count_bins(seen[:, k].astype(np.float64), bins)
        assert psi(np.array(bins.shares), counts.astype(np.float64)) < 0.15, name


def test_faster_wear_ends_lives_sooner() -> None:
    """An engine that wears twice as fast flies half as long and ends as worn."""
    usual, fast = SimulatedEngine(0), SimulatedEngine(0)
    life, half = usual.fly(1000), fast.fly(1000, wear_rate=2.0)
    assert -(-len(life) // 2) == len(half)
    assert usual.failed
    assert fast.failed


def test_planted_drift_does_what_it_says(simulated: list[cmapss.History]) -> None:
    """A bias moves one sensor by its deviations, noise widens it, a new condition moves settings; nothing before."""
    rows, k = np.concatenate([engine.telemetry for engine in simulated[:8]]), SENSORS.index("sensor_11")
    statistics, column = fleet.read_statistics(), SETTING_COUNT + SENSORS.index("sensor_11")

    def moved(text: str) -> Floats:
        planted = DriftInjector([parse_drift(text)])
        found = [planted.inject(row, i, (0, i)) - row.astype(np.float64) for i, row in enumerate(rows)]
        return np.array(found)

    condition = statistics.nearest_conditions(rows[:, :SETTING_COUNT])
    bias = moved("sensor_11:+2sd@600")
    assert not bias[:600].any()
    np.testing.assert_allclose(2 * statistics.deviation[condition, k][600:], bias[600:, column], atol=0.006)
    assert not np.delete(bias, column, axis=1).any()
    np.testing.assert_allclose(-0.5, moved("sensor_11:-0.5")[:, column], atol=0.006)
    noise = moved("sensor_11:x3noise")[:, column] / statistics.noise[condition, k]
    assert np.sqrt(8) == pytest.approx(noise.std(), rel=0.1)
    assert 0.2 == pytest.approx((moved("condition:20%")[:, 0] != 0).mean(), abs=0.03)
    assert [1.0, 2.0] == [DriftInjector([parse_drift("wear:x2@600")]).wear_rate(flight) for flight in (599, 600)]


@pytest.mark.parametrize(
    ("text", "why"),
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
def test_what_is_no_drift_is_said_so(text: str, why: str) -> None:
    """A drift that cannot be is refused in one line."""
    with pytest.raises(DriftError, match=why) as refused:
        parse_drift(text)
    assert "\n" not in str(refused.value)
