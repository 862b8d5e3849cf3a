import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from model.contract import Histogram, Manifest, Reference
from model.evaluation.drift import count_bins, distances, jensen_shannon, psi, psi_noise
from service.calibration.statistics import drift

SHARES = np.array([0.1, 0.2, 0.3, 0.4])
counts = st.lists(st.integers(0, 10**6), min_size=4, max_size=4).filter(sum)


def test_psi_of_an_example() -> None:
    """Σ (q - p) ln (q / p) is exact for a million rows, where smoothing is negligible."""
    q = np.array([0.2, 0.2, 0.2, 0.4])
    expected = 0.1 * np.log(2) + -0.1 * np.log(2 / 3)
    assert expected == pytest.approx(psi(SHARES, 1e6 * q), rel=1e-5)


def test_jensen_shannon_agrees_with_scipy() -> None:
    """Disjoint histograms differ by ln 2, equal ones by 0, others by the square of scipy's distance."""
    assert np.log(2) == pytest.approx(jensen_shannon(np.array([1.0, 0, 0]), np.array([0.0, 3, 4])))
    assert 0.0 == jensen_shannon(SHARES, SHARES * 70)
    counts = np.array([5.0, 0, 9, 2])
    assert jensenshannon(SHARES, counts / 16) ** 2 == pytest.approx(jensen_shannon(SHARES, counts))


@given(counts)
def test_distances_are_bounded(counts: list[int]) -> None:
    """With any empty bins, PSI is finite and not negative, and Jensen-Shannon is between 0 and ln 2."""
    for shares in (SHARES, np.array([0.0, 0.5, 0.0, 0.5])):
        values = np.array(counts, dtype=float)
        assert 0 <= psi(shares, values) < 40
        assert 0 <= jensen_shannon(shares, values) <= np.log(2) + 1e-12


@pytest.mark.parametrize("n", [50, 500, 20_000])
def test_psi_noise_is_mean_psi_without_drift(n: int) -> None:
    """Rows drawn from the reference have a mean PSI close to the noise, also with an empty bin."""
    random = np.random.default_rng(0)
    for shares in (SHARES, np.array([0.0, 0.02, 0.28, 0.3, 0.4])):
        mean = np.mean([psi(shares, counts.astype(float)) for counts in random.multinomial(n, shares, 2000)])
        assert psi_noise(shares, n) == pytest.approx(mean, rel=0.15, abs=2e-5)


def test_count_bins_assigns_edges_to_the_lower_bin() -> None:
    """A value on an edge belongs to the lower bin, and the outer bins are open."""
    bins = Histogram(edges=[1.0, 2.0], shares=[0.3, 0.3, 0.4])
    assert [2, 1, 1] == count_bins(np.array([-9.0, 1.0, 2.0, 99.0]), bins).tolist()


def test_distances_without_rows_are_null() -> None:
    """Without rows, distances are null."""
    bins = Histogram(edges=[1.0], shares=[0.5, 0.5])
    assert {"psi": None, "noise": None, "jensen_shannon": None, "n": 0} == distances(bins, [0, 0], "confidence")


@pytest.mark.parametrize("invalid", [[1, 2, 3], [1], [-1, 2], [np.nan, 1], [[1, 2]]])
def test_distances_with_invalid_counts_raise(invalid: list[float]) -> None:
    """Too few, too many, negative or no counts are an error that names the histogram."""
    with pytest.raises(ValueError, match="sensor_2: expected 2 counts"):
        distances(Histogram(edges=[1.0], shares=[0.5, 0.5]), invalid, "sensor_2")


def test_drift_reports_every_histogram(manifest: Manifest) -> None:
    """Counts equal to the reference show no drift; drift of one channel is reported for this channel only."""
    reference = manifest.reference
    assert reference is not None
    assert reference.confidence is not None
    assert reference.entropy_nats is not None
    usual = {name: np.round(1000 * np.array(bins.shares)) for name, bins in reference.channels.items()}
    moved = usual | {"sensor_4": np.eye(len(usual["sensor_4"]))[-1] * 1000}
    confidence, entropy = (1000 * np.array(bins.shares) for bins in (reference.confidence, reference.entropy_nats))
    values = drift(reference, confidence, entropy, moved)
    assert ["confidence", "entropy", "channels"] == list(values)
    assert values["confidence"]["psi"] < values["confidence"]["noise"]
    assert {"sensor_4"} == {name for name, channel in values["channels"].items() if channel["psi"] > 0.2}
    assert values["channels"]["sensor_4"]["jensen_shannon"] > 0.3


def test_drift_without_reference_is_null() -> None:
    """Drift without a reference is null, and a channel without a reference is an error that names it."""
    assert {"confidence": None, "entropy": None, "channels": {}} == drift(Reference(), [], [], {})
    with pytest.raises(ValueError, match="'sensor_4' has no reference"):
        drift(Reference(), [], [], {"sensor_4": [1]})


def test_drift_error_names_the_histogram() -> None:
    """Counts that do not match the bins are an error that names confidence, entropy or the channel."""
    bins = Histogram(edges=[1.0], shares=[0.5, 0.5])
    reference = Reference(confidence=bins, entropy_nats=bins, channels={"sensor_4": bins})
    fits = [1, 1]
    for name, counts in (
        ("confidence", ([1], fits, fits)),
        ("entropy", (fits, [1], fits)),
        ("sensor_4", (fits, fits, [1])),
    ):
        confidence, entropy, sensor = counts
        with pytest.raises(ValueError, match=f"^{name}: expected 2 counts"):
            drift(reference, confidence, entropy, {"sensor_4": sensor})
