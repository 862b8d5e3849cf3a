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


def test_psi_by_hand() -> None:
    """Without smoothing to speak of, a million rows give Σ (q - p) ln (q / p)."""
    q = np.array([0.2, 0.2, 0.2, 0.4])
    expected = 0.1 * np.log(2) + -0.1 * np.log(2 / 3)
    assert expected == pytest.approx(psi(SHARES, 1e6 * q), rel=1e-5)


def test_jensen_shannon_by_hand_and_by_scipy() -> None:
    """Disjoint histograms are ln 2 apart, equal ones 0, others as scipy squares its distance."""
    assert np.log(2) == pytest.approx(jensen_shannon(np.array([1.0, 0, 0]), np.array([0.0, 3, 4])))
    assert 0.0 == jensen_shannon(SHARES, SHARES * 70)
    seen = np.array([5.0, 0, 9, 2])
    assert jensenshannon(SHARES, seen / 16) ** 2 == pytest.approx(jensen_shannon(SHARES, seen))


@given(counts)
def test_distances_are_bounded(seen: list[int]) -> None:
    """PSI is never negative and finite whatever bins are empty; Jensen-Shannon is between 0 and ln 2."""
    for shares in (SHARES, np.array([0.0, 0.5, 0.0, 0.5])):
        found = np.array(seen, dtype=float)
        assert 0 <= psi(shares, found) < 40
        assert 0 <= jensen_shannon(shares, found) <= np.log(2) + 1e-12


@pytest.mark.parametrize("n", [50, 500, 20_000])
def test_noise_is_the_mean_of_psi_without_drift(n: int) -> None:
    """Rows drawn from the reference give a PSI of about its noise on average, also where a bin is never filled."""
    random = np.random.default_rng(0)
    for shares in (SHARES, np.array([0.0, 0.02, 0.28, 0.3, 0.4])):
        found = np.mean([psi(shares, seen.astype(float)) for seen in random.multinomial(n, shares, 2000)])
        assert psi_noise(shares, n) == pytest.approx(found, rel=0.15, abs=2e-5)


def test_counts_fall_as_in_the_reference() -> None:
    """A value on an edge belongs to the bin below; the outer bins are open."""
    bins = Histogram(edges=[1.0, 2.0], shares=[0.3, 0.3, 0.4])
    assert [2, 1, 1] == count_bins(np.array([-9.0, 1.0, 2.0, 99.0]), bins).tolist()


def test_no_rows_are_no_drift() -> None:
    """Without rows there is nothing to say, and nothing fails."""
    bins = Histogram(edges=[1.0], shares=[0.5, 0.5])
    assert {"psi": None, "noise": None, "jensen_shannon": None, "n": 0} == distances(bins, [0, 0], "confidence")


@pytest.mark.parametrize("wrong", [[1, 2, 3], [1], [-1, 2], [np.nan, 1], [[1, 2]]])
def test_counts_must_fit_the_bins(wrong: list[float]) -> None:
    """Too few bins, too many, negative counts or none at all are refused by the histogram's name."""
    with pytest.raises(ValueError, match="sensor_2: expected 2 counts"):
        distances(Histogram(edges=[1.0], shares=[0.5, 0.5]), wrong, "sensor_2")


def test_drift_reports_every_histogram_of_the_artefact(manifest: Manifest) -> None:
    """Counts as the reference has them show no drift; one channel in its last bin shows there and nowhere else."""
    reference = manifest.reference
    assert reference is not None
    assert reference.confidence is not None
    assert reference.entropy_nats is not None
    usual = {name: np.round(1000 * np.array(bins.shares)) for name, bins in reference.channels.items()}
    moved = usual | {"sensor_4": np.eye(len(usual["sensor_4"]))[-1] * 1000}
    confidence, entropy = (1000 * np.array(bins.shares) for bins in (reference.confidence, reference.entropy_nats))
    found = drift(reference, confidence, entropy, moved)
    assert ["confidence", "entropy", "channels"] == list(found)
    assert found["confidence"]["psi"] < found["confidence"]["noise"]
    assert {"sensor_4"} == {name for name, one in found["channels"].items() if one["psi"] > 0.2}
    assert found["channels"]["sensor_4"]["jensen_shannon"] > 0.3


def test_drift_of_a_model_without_reference() -> None:
    """What the manifest does not know is null, and a channel that it does not know is refused by name."""
    assert {"confidence": None, "entropy": None, "channels": {}} == drift(Reference(), [], [], {})
    with pytest.raises(ValueError, match="'sensor_4' has no reference"):
        drift(Reference(), [], [], {"sensor_4": [1]})


def test_drift_names_the_histogram_whose_counts_do_not_fit() -> None:
    """Counts that do not fit the bins of confidence, entropy or a channel are refused by the name of the histogram."""
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
