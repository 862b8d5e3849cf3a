"""Rates of false and true alarms of the calibration state if it is checked after every label.

    python -m benchmarks.monitor [--streams 500] [--labels 5000]        # = make bench-monitor

The state is compared with the z of the loss gap and with ECE against its noise band. Both are valid for one check
only, not for thousands. Prints Markdown; takes 15 min on one core.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks.streams import Looks, Random, Stream, agrees, alike, fleet, independent, looks
from model import numerics
from model.evaluation import calibration_report
from model.evaluation.sequential import log_e
from model.numerics import Floats
from service.calibration.statistics import ALPHA_GAP, REPRESENTATIVE_SHARE, evidences, state

ECE_EVERY, BAND_DRAWS = 10, 200
SHARP, FLAT = 1.5, 1 / 1.5  # a true temperature of 1.5: logits 1.5 times too sharp
FLEET, LARGE_FLEET = 100, 300  # engines
MOVING, MOVING_LABELS, MOVING_EVERY = 2000, 20_000, 50
Make = Callable[[Random], Stream]


def z_alarms(stream: Stream, seen: Looks) -> bool:
    """Return whether |z| of the loss gap, computed by rows, ever exceeds 1.96."""
    deviation = np.sqrt(np.cumsum(numerics.loss_variance(stream.z)))
    return bool((abs(seen.gap.total) > 1.96 * deviation)[seen.enough].any())


def ece_alarms(stream: Stream, seen: Looks, random: Random) -> bool:
    """Return whether ECE ever exceeds the 95th percentile of a calibrated model with the same n."""
    top = numerics.softmax(stream.z).max(axis=1)
    bins = np.eye(numerics.RELIABILITY_BINS)[numerics.bin_of(top)]
    gap = np.cumsum(bins * (top - numerics.correct(stream.z, stream.label))[:, None], axis=0)[::ECE_EVERY]
    spread = np.sqrt(np.cumsum(bins * (top * (1 - top))[:, None], axis=0))[::ECE_EVERY]
    draws = abs(random.normal(size=(BAND_DRAWS, numerics.RELIABILITY_BINS)))
    beyond = abs(gap).sum(axis=1) > np.quantile(spread @ draws.T, 0.95, axis=1)
    return bool(beyond[seen.enough[::ECE_EVERY]].any())


def false_alarms(make: Make, streams: int) -> list[float]:
    """Return the shares of calibrated streams that ever alarm: the state, the gap by rows only, z, ECE."""
    alarms = []
    for seed in range(streams):
        random = np.random.default_rng(seed)
        stream = make(random)
        seen = looks(stream)
        if not agrees(stream, seen, int(random.integers(len(stream.label)))):
            raise SystemExit(f"monitor: stream {seed}: the state differs from that of calibration()")
        alone = (log_e(seen.gap.total, seen.gap.rows) >= -np.log(ALPHA_GAP))[seen.enough].any()
        alarms.append((seen.alarms().any(), alone, z_alarms(stream, seen), ece_alarms(stream, seen, random)))
    return [float(share) for share in np.mean(np.array(alarms, dtype=np.float64), axis=0)]


def find_first_detections(make: Make, sign: int, streams: int) -> tuple[Floats, Floats]:
    """Return labels and engines until each stream is over- (sign 1) or underconfident (-1); infinite if never."""
    labels, engines = np.full(streams, np.inf), np.full(streams, np.inf)
    for seed in range(streams):
        stream = make(np.random.default_rng(seed))
        indices = np.flatnonzero(looks(stream).detects(sign))
        if len(indices):
            labels[seed] = indices[0] + 1
            engines[seed] = len(np.unique(stream.engine[: indices[0] + 1]))
    return labels, engines


def strays(stream: Stream, sharpness: float) -> bool:
    """Return whether the confidence sequence ever excludes the true mean gap, for logits z / sharpness."""
    log_p, true_p = numerics.log_softmax(stream.z), numerics.softmax(stream.z, sharpness)
    expected = np.cumsum(((numerics.softmax(stream.z) - true_p) * log_p).sum(axis=1))
    return bool((looks(stream).gap.log_e(expected) >= -np.log(ALPHA_GAP)).any())


def moving(stream: Stream) -> bool:
    """Return whether the state of a moving window of the newest labels ever alarms."""
    for end in range(MOVING, len(stream.label) + 1, MOVING_EVERY):
        k = slice(end - MOVING, end)
        report = calibration_report.measure_rows(stream.z[k], stream.label[k], stream.engine[k])
        if state(report.engines.count, *evidences(report)) != "calibrated":
            return True
    return False


def selected(seed: int) -> tuple[bool, bool]:
    """Return whether the state ever alarms, and after enough labels, if labels arrive as engines fail."""
    alarms = looks(fleet(np.random.default_rng(seed), FLEET, "failing")).alarms()
    return bool(alarms.any()), bool(alarms[int(REPRESENTATIVE_SHARE * len(alarms)) :].any())


def calibrated_table(streams: int, labels: int) -> Iterator[str]:
    """Yield a Markdown table of calibrated streams that ever alarm."""
    cases: dict[str, Make] = {
        "rows independent, one per engine": lambda random: independent(random, labels),
        "rows independent, 50 engines": lambda random: independent(random, labels, engines=50),
        f"{FLEET} engines to failure, labels at failure": lambda random: fleet(random, FLEET, "outcome"),
        f"{FLEET} engines to failure, inspected daily": lambda random: fleet(random, FLEET, "daily"),
        "the same, started on different days": lambda random: fleet(random, FLEET, "staggered"),
        "50 engines to failure, labels at failure": lambda random: fleet(random, FLEET // 2, "outcome"),
        f"{FLEET} engines, one label for all 50 rows": lambda random: alike(random, FLEET, 50),
    }
    yield "| calibrated streams that ever alarm | state | gap, rows only | \\|z\\| > 1.96 | ECE above its band |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, make in cases.items():
        yield f"| {name} | " + " | ".join(f"{share:.1%}" for share in false_alarms(make, streams)) + " |"


def detection_table(streams: int, labels: int) -> Iterator[str]:
    """Yield a Markdown table of detected streams whose logits are too sharp or too flat."""
    cases: dict[str, Callable[[float, Random], Stream]] = {
        "rows independent": lambda sharpness, random: independent(random, labels, sharpness),
        "engines to failure, labels at failure": lambda sharpness, random: fleet(
            random, LARGE_FLEET, "outcome", sharpness
        ),
        "engines, inspected daily": lambda sharpness, random: fleet(random, LARGE_FLEET, "daily", sharpness),
    }
    yield "| true temperature | streams | detected | labels until 50 % / 90 % | engines until 50 % / 90 % |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for name, make in cases.items():
        for sharpness, sign in ((SHARP, 1), (FLAT, -1)):
            first_detections = find_first_detections(partial(make, sharpness), sign, streams)
            shares = (
                " / ".join(f"{x:,.0f}" for x in np.quantile(counts, [0.5, 0.9], method="higher"))
                for counts in first_detections
            )
            yield (
                f"| {sharpness:.2f} | {name} | {np.isfinite(first_detections[0]).mean():.1%} | "
                + " | ".join(shares)
                + " |"
            )


def others_table(streams: int, labels: int) -> Iterator[str]:
    """Yield a Markdown table of cases without a guarantee, and of the confidence sequence."""
    yield "| case | share of streams |"
    yield "| --- | ---: |"
    for sharpness in (1.0, SHARP, FLAT):
        left = [strays(independent(np.random.default_rng(s), labels, sharpness), sharpness) for s in range(streams)]
        yield f"| the 96 % sequence ever excludes the true gap, T = {sharpness:.2f} | {np.mean(left):.1%} |"
    parts = [moving(independent(np.random.default_rng(s), MOVING_LABELS)) for s in range(max(streams // 5, 1))]
    yield f"| the newest {MOVING:,} of {MOVING_LABELS:,} labels, a moving window, ever alarm | {np.mean(parts):.1%} |"
    ever, late = np.mean([selected(seed) for seed in range(streams)], axis=0)
    yield f"| engines start together, labels arrive as they fail, ever alarm | {ever:.1%} |"
    yield f"| the same, after {REPRESENTATIVE_SHARE:.0%} of all predictions are labelled | {late:.1%} |"


def main() -> None:
    """Simulate the streams and print the tables."""
    parser = argparse.ArgumentParser(description="False and true alarms of the calibration state.")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--labels", type=int, default=5000)
    flags = parser.parse_args()
    for table in (calibrated_table, detection_table, others_table):
        for line in table(flags.streams, flags.labels):
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
