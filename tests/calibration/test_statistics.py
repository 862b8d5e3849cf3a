import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.streams import Stream, agrees, alike, fleet, independent, looks
from model import numerics
from model.contract import CHANNELS, Manifest
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, onnx_runner, open_artefact, predict_histories
from model.evaluation.evaluation_metrics import class_metrics, concatenate_rows
from model.windows import Readings, every_window
from service.calibration.statistics import (
    AGES,
    ALPHA_CLASSES,
    ALPHA_GAP,
    DAY,
    REPRESENTATIVE_SHARE,
    CalibrationRows,
    calibration,
    over_time,
    state,
)

CLASSES = ("normal", "degrading", "critical")
NOW = 1_000_000.0
Random = np.random.Generator


def rows(z: Any, label: Any, engine: Any = None, **rest: Any) -> CalibrationRows:
    """Predictions made a minute ago and labelled half a minute later, but for what is given."""
    logits = np.atleast_2d(np.asarray(z, dtype=np.float32))
    n, classes = logits.shape
    q = np.asarray(label, dtype=np.float64)
    if q.ndim == 1:
        q = np.where(np.isnan(q)[:, None], np.nan, np.eye(classes)[np.nan_to_num(q).astype(int)])
    known = ~np.isnan(q[:, 0])
    made = CalibrationRows(
        logits,
        np.ones(n),
        q,
        np.arange(n) if engine is None else np.asarray(engine),
        np.where(known, 1.0, np.nan),
        np.full(n, 2.0),
        np.full(n, NOW - 60),
        np.where(known, NOW - 30, np.nan),
        np.where(known, 0, -1),
    )
    return replace(made, **rest)


def calibrated(n: int = 600, engines: int = 60, seed: int = 0, sharpness: float = 1.0) -> CalibrationRows:
    stream = independent(np.random.default_rng(seed), n, sharpness, engines)
    return rows(stream.z, stream.label, stream.engine)


def said(found: CalibrationRows, classes: tuple[str, ...] = CLASSES) -> dict[str, Any]:
    """Return the report; it must survive JSON without NaN."""
    answer = calibration(found, classes, NOW, 0.9, "30d")
    read: dict[str, Any] = json.loads(json.dumps(answer, allow_nan=False))
    assert read == answer
    return read


def moved(found: CalibrationRows, order: np.ndarray) -> CalibrationRows:
    return CalibrationRows(*(column[order] for column in vars(found).values()))


def test_calibration_report_has_every_field() -> None:
    """Every field of `GET /v1/calibration` is there, filled from labelled predictions."""
    found = said(calibrated())
    assert [
        "window", "n", "engines", "state", "evidence", "cross_entropy", "brier", "brier_decomposition", "accuracy",
        "ece", "reliability", "classes", "conformal", "labels", "label_free",
    ] == list(found)  # fmt: skip
    assert ("30d", 600, 60, "calibrated") == tuple(found[name] for name in ("window", "n", "engines", "state"))
    assert {"realised", "expected", "gap", "z", "z_engines", "interval"} == set(found["cross_entropy"])
    assert {"value", "noise_band", "equal_mass", "interval"} == set(found["ece"])
    assert {"lower", "upper", "n", "confidence", "accuracy"} == set(found["reliability"][0])
    assert 15 == len(found["reliability"])
    assert {"class", "n", "ece", "recall", "precision", "mean_predicted", "mean_observed", "log10_e"} == set(
        found["classes"][0]
    )
    assert CLASSES == tuple(one["class"] for one in found["classes"])
    assert {"level": 0.9, "coverage": 1.0, "mean_size": 2.0} == found["conformal"]
    assert {"share", "by_age", "lag_seconds", "sources", "selection_biased"} == set(found["labels"])
    assert {"accuracy", "cross_entropy", "error"} == set(found["label_free"])


def test_figures_are_those_of_the_evaluation() -> None:
    """Cross-entropy, accuracy, Brier and ECE equal `model.numerics` for the same logits and temperature."""
    made = replace(calibrated(), temperature=np.full(600, 1.3))
    found, label = said(made), made.label.argmax(axis=1)
    assert float(numerics.cross_entropy(made.logits, label, 1.3)) == pytest.approx(found["cross_entropy"]["realised"])
    assert float(numerics.entropy(made.logits, 1.3).mean()) == pytest.approx(found["cross_entropy"]["expected"])
    assert float(numerics.correct(made.logits, label).mean()) == found["accuracy"]
    assert float(numerics.brier(made.logits, label, 1.3).mean()) == pytest.approx(found["brier"])
    assert numerics.ece(made.logits, label, 1.3) == pytest.approx(found["ece"]["value"])
    rising = made.logits[np.argsort(numerics.softmax(made.logits, 1.3).max(axis=1))]
    assert list(numerics.ece_noise_band(rising, 1.3)) == pytest.approx(found["ece"]["noise_band"])
    assert found["brier"] == pytest.approx(float(np.dot([1, -1, 1, 1], list(found["brier_decomposition"].values()))))


def test_row_is_scored_at_the_temperature_of_its_prediction() -> None:
    """Doubled logits at twice the temperature give the same report."""
    made = calibrated()
    twice = np.where(np.arange(600) % 2, 2.0, 1.0)
    other = replace(made, temperature=twice, logits=(made.logits * twice[:, None]).astype(np.float32))
    assert same(said(made)["cross_entropy"], said(other)["cross_entropy"])


def same(one: Any, other: Any) -> bool:
    """Equal but for rounding, in any depth."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == pytest.approx(other, rel=1e-9, abs=1e-9)) if isinstance(one, float) else one == other


def test_order_of_rows_changes_nothing() -> None:
    """However labels arrived, the answer is the same; in the same order it is the same to the bit."""
    made = replace(calibrated(), label=np.where((np.arange(600) % 3 == 0)[:, None], np.nan, calibrated().label))
    first = said(made)
    for seed in range(3):
        assert same(first, said(moved(made, np.random.default_rng(seed).permutation(600))))
    assert first == said(made)


def test_unlabelled_rows_touch_the_label_free_part_alone() -> None:
    """Predictions without a label change shares and label-free estimates, and no labelled figure."""
    made = calibrated()
    more = rows(
        np.concatenate([made.logits, made.logits[:200] * 3]),
        np.r_[made.label.argmax(1), np.full(200, np.nan)],
        np.r_[made.engine, np.arange(200)],
    )
    one, other = said(made), said(more)
    for name in ("n", "engines", "state", "evidence", "cross_entropy", "brier", "ece", "reliability", "classes"):
        assert same(one[name], other[name]), name
    assert 0.75 == other["labels"]["share"]
    assert other["label_free"]["accuracy"] > one["label_free"]["accuracy"]
    assert same(one["label_free"]["error"], other["label_free"]["error"])


def test_label_free_error_is_estimate_minus_observed() -> None:
    """With three rows of confidence 0.8, of which one is correct, accuracy is overestimated by 0.8 minus a third."""
    z = np.log([[0.8, 0.2]] * 3)
    found = said(rows(z, [0, 1, 1]), ("a", "b"))["label_free"]
    assert 0.8 == pytest.approx(found["accuracy"], abs=1e-6)
    assert 0.8 - 1 / 3 == pytest.approx(found["error"]["accuracy"], abs=1e-6)
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    loss = -(np.log(0.8) + 2 * np.log(0.2)) / 3
    assert entropy - loss == pytest.approx(found["error"]["cross_entropy"], abs=1e-6)


def test_classes_by_hand() -> None:
    """A class that is never predicted has no precision, and a class without labels has no recall."""
    z = np.log([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    normal, degrading, critical = said(rows(z, [0, 1, 1]))["classes"]
    assert (1, 1.0, 0.5) == (normal["n"], normal["recall"], normal["precision"])
    assert (2, 0.5, 1.0) == (degrading["n"], degrading["recall"], degrading["precision"])
    assert (0, None, None) == (critical["n"], critical["recall"], critical["precision"])
    assert (0.6, 2 / 3) == pytest.approx((normal["mean_predicted"], degrading["mean_observed"]), abs=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("classes", [1, 2, 3, 10])
@pytest.mark.parametrize("labelled", [True, False])
def test_few_rows_are_null_and_never_nan(n: int, classes: int, labelled: bool) -> None:
    """No predictions, no labels, one row, one class: the answer is JSON, and says that it has too few engines."""
    label = np.zeros(n) if labelled else np.full(n, np.nan)
    found = said(rows(np.zeros((n, classes)), label), tuple(map(str, range(classes))))
    count = n if labelled else 0
    assert (count, count, "insufficient_data") == (found["n"], found["engines"], found["state"])
    assert (None if count == 0 else pytest.approx(np.log(classes))) == found["cross_entropy"]["realised"]
    assert (found["label_free"]["error"] is None) == (count == 0)
    assert (found["evidence"]["gap"]["interval"] is None) == (count == 0)
    filled = [one for one in found["reliability"] if one["n"]]
    assert (min(count, 1), count) == (len(filled), sum(one["n"] for one in filled))
    assert all((one["accuracy"] is None) == (one["n"] == 0) for one in found["reliability"])


@pytest.mark.parametrize(
    "z",
    [
        [[1e4, 0, -1e4]] * 30,  # p is exactly 1 and 0
        [[3e38, -3e38, 0]] * 30,
        [[0, 0, 0]] * 30,
    ],
)
@pytest.mark.parametrize("truth", [0, 1])
def test_certainty_right_and_wrong_is_finite(z: list[list[float]], truth: int) -> None:
    """Probabilities of exactly 0 and 1, right or wrong, in one engine or thirty, give finite figures or null."""
    for engine in (np.zeros(30, dtype=int), np.arange(30)):
        found = said(rows(z, np.full(30, truth), engine, temperature=np.full(30, 0.01)))
        assert found["cross_entropy"]["realised"] is not None
        if z[0][0] > 0 and truth:  # certain and wrong each time: one engine proves nothing, thirty do
            assert (engine.max() == 0) == (found["state"] == "insufficient_data")
            assert "calibrated" != found["state"]


def test_soft_labels_count_in_parts() -> None:
    """A label that is a distribution costs its whole cross-entropy, and its parts count in each class."""
    q = np.tile([0.7, 0.3, 0.0], (40, 1))
    found = said(rows(np.log(np.tile([0.7, 0.2, 0.1], (40, 1))), q))
    assert -(0.7 * np.log(0.7) + 0.3 * np.log(0.2)) == pytest.approx(found["cross_entropy"]["realised"], abs=1e-6)
    assert 0.7 == pytest.approx(found["accuracy"])
    assert [28, 12, 0] == pytest.approx([one["n"] for one in found["classes"]])


def test_labels_are_reported_by_age_lag_and_source() -> None:
    """Shares by the age of the prediction, lags of the labels, counts by source; a label that came first has no lag."""
    age = np.array([0.0, 0.5, 2, 40, 100]) * DAY
    at = np.array([np.nan, NOW - 1, NOW - 3 * DAY, NOW - 38 * DAY, NOW - 90 * DAY])
    label = np.where(np.isnan(at), np.nan, 0)
    made = rows(np.zeros((5, 3)), label, made_at=NOW - age, labelled_at=at, source=np.array([-1, 0, 1, 1, 2]))
    found = said(made)["labels"]
    assert [2, 1, 0, 1, 1] == [band["n"] for band in found["by_age"]]
    assert [0.5, 1, None, 1, 1] == [band["share"] for band in found["by_age"]]
    assert [*AGES, None] == [found["by_age"][0]["from_seconds"], *(band["to_seconds"] for band in found["by_age"])]
    assert np.median([0.5 * DAY - 1, 0, 2 * DAY, 10 * DAY]) == pytest.approx(found["lag_seconds"]["p50"])
    assert {"inspection": 1, "outcome": 2, "survival": 1} == found["sources"]
    assert (0.8, False) == (found["share"], found["selection_biased"])


@pytest.mark.parametrize(("outcomes", "sufficient"), [(0, False), (19, False), (20, True)])
def test_state_with_survival_labels_only_is_insufficient(outcomes: int, sufficient: bool) -> None:
    """The state needs 20 engines with another label than survival; survivors and unlabelled engines are no such."""
    engine = np.arange(60) % 40
    source = np.where(engine < outcomes, 1, np.where(engine < 30, 2, -1))
    label = np.where(source < 0, np.nan, 1.0)
    predictions = rows(np.tile([9.0, 0, 0], (60, 1)), label, engine, source=source)
    assert ("overconfident" if sufficient else "insufficient_data") == said(predictions)["state"]


def test_largest_scaled_logits_are_accepted() -> None:
    """Logits of 1e41 after the temperature are accepted, and their figures are finite or null."""
    predictions = rows(np.zeros((30, 3)), np.zeros(30))
    assert 30 == said(replace(predictions, logits=np.tile([1e41, -1e41, 0], (30, 1))))["n"]


def test_evidence_states_where_it_alarms() -> None:
    """The evidence has the engines that it needs, its e-values, and the e-values and the level at which it alarms."""
    answer = said(calibrated())
    evidence = answer["evidence"]
    e_values = [10 ** section["log10_e"] for section in answer["classes"]]
    assert np.mean(e_values) == pytest.approx(10 ** evidence["classes"]["log10_e"])
    assert {"engines_needed", "gap", "classes"} == set(evidence)
    assert {"log10_e", "alarm_at", "level", "interval"} == set(evidence["gap"])
    assert 20 == evidence["engines_needed"]
    assert (np.log10(25), 0.96) == pytest.approx((evidence["gap"]["alarm_at"], evidence["gap"]["level"]))
    assert {"log10_e", "alarm_at"} == set(evidence["classes"])
    assert 2 == pytest.approx(evidence["classes"]["alarm_at"])


@pytest.mark.parametrize(
    ("gap", "total", "classes", "expected"),
    [
        (-np.log(ALPHA_GAP), 0.5, 0.0, "overconfident"),
        (-np.log(ALPHA_GAP), -0.5, 0.0, "underconfident"),
        (-np.log(ALPHA_GAP) - 1e-9, 0.5, 0.0, "calibrated"),
        (0.0, 0.5, -np.log(ALPHA_CLASSES), "drifting"),
        (0.0, 0.5, -np.log(ALPHA_CLASSES) - 1e-9, "calibrated"),
        (9.0, 0.5, 9.0, "overconfident"),
    ],
)
def test_state_at_the_e_value_of_its_alarm_alarms(gap: float, total: float, classes: float, expected: str) -> None:
    """An e-value that reaches that of the alarm alarms, the sign of the gap names it, and the gap comes first."""
    evidence: Any = SimpleNamespace(log_e=gap, total=total)
    frequencies: Any = [SimpleNamespace(log_e=classes)]
    assert expected == state(20, evidence, frequencies)
    assert "insufficient_data" == state(19, evidence, frequencies)


def test_lag_of_labels_has_a_median_and_a_ninth_decile() -> None:
    """Lags are seconds from prediction to label; a label that came before its prediction has a lag of 0."""
    for lags in ([0.25, 1, 3, 10, 60], [-5.0, -4, -3, -2, 0]):
        labelled_at = NOW - 60 + np.array(lags)
        predictions = rows(np.zeros((5, 3)), np.zeros(5), made_at=np.full(5, NOW - 60), labelled_at=labelled_at)
        lag = said(predictions)["labels"]["lag_seconds"]
        assert {"p50": max(0, lags[2]), "p90": max(0, lags[3] + 0.6 * (lags[4] - lags[3]))} == pytest.approx(lag)


def test_few_labels_are_called_selected() -> None:
    """Below the share that describes a fleet, and without any prediction, the selection is declared."""
    n = 100
    for labelled in (0, int(REPRESENTATIVE_SHARE * n) - 1, int(REPRESENTATIVE_SHARE * n)):
        label = np.where(np.arange(n) < labelled, 0.0, np.nan)
        assert (labelled < REPRESENTATIVE_SHARE * n) == said(rows(np.zeros((n, 3)), label))["labels"][
            "selection_biased"
        ]
    assert said(rows(np.zeros((0, 3)), []))["labels"]["selection_biased"]


def test_without_a_rule_there_is_no_conformal_part() -> None:
    """A model without prediction sets says null, and one with them their coverage over labelled rows."""
    made = rows(
        np.zeros((4, 3)), [0, 0, 0, np.nan], covered=np.array([1, 0, 1, np.nan]), set_size=np.array([1.0, 1, 2, 3])
    )
    assert calibration(made, CLASSES, NOW)["conformal"] is None
    assert {"level": 0.9, "coverage": 2 / 3, "mean_size": 4 / 3} == pytest.approx(said(made)["conformal"])


@pytest.mark.parametrize("engines", [19, 20])
def test_state_with_few_engines_is_insufficient_data(engines: int) -> None:
    """19 engines raise no alarm although every row is wrong; 20 engines do."""
    found = said(rows(np.tile([9.0, 0, 0], (400, 1)), np.ones(400), np.arange(400) % engines))
    assert ("insufficient_data" if engines < 20 else "overconfident") == found["state"]


def test_state_names_the_kind_of_miscalibration() -> None:
    """Too sharp is overconfident, too flat underconfident, other class frequencies at the expected loss drifting."""
    assert "overconfident" == said(calibrated(3000, 3000, sharpness=2.0))["state"]
    assert "underconfident" == said(calibrated(3000, 3000, sharpness=0.5))["state"]
    p = np.array([0.45, 0.45, 0.1])
    label = np.random.default_rng(0).choice(3, 1500, p=[0.65, 0.25, 0.1])
    found = said(rows(np.tile(np.log(p), (1500, 1)), label, np.arange(1500)))
    assert "drifting" == found["state"]
    assert found["classes"][0]["log10_e"] > found["classes"][2]["log10_e"]
    assert found["evidence"]["classes"]["log10_e"] > found["evidence"]["classes"]["alarm_at"]
    assert found["evidence"]["gap"]["interval"][0] < 0 < found["evidence"]["gap"]["interval"][1]


DEPENDENT: dict[str, Callable[[Random], Stream]] = {
    "independent rows": lambda random: independent(random, 2000),
    "engines, outcome immediately": lambda random: fleet(random, 50, "outcome"),
    "engines, day by day": lambda random: fleet(random, 50, "daily"),
    "one truth an engine": lambda random: alike(random, 50, 40),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEPENDENT)
def test_looking_after_every_label_raises_no_false_alarm(kind: str) -> None:
    """At most 8 of 60 calibrated streams ever alarm; with 5 % each, more than 8 occur once in 300 runs."""
    alarmed = sum(looks(DEPENDENT[kind](np.random.default_rng(1000 + seed))).alarms().any() for seed in range(60))
    assert alarmed <= 8


@pytest.mark.parametrize(("sharpness", "sign"), [(1.5, 1), (1 / 1.5, -1)])
def test_wrong_temperature_is_detected(sharpness: float, sign: int) -> None:
    """Of twenty streams of which every logit is too sharp, or too flat, all are found within a thousand labels."""
    streams = (independent(np.random.default_rng(seed), 1000, sharpness) for seed in range(20))
    assert 20 == sum(looks(stream).detects(sign).any() for stream in streams)


@pytest.mark.parametrize("kind", DEPENDENT)
def test_simulated_look_equals_the_report(kind: str) -> None:
    """The state and evidence of the simulations equal those of the report of the service."""
    for seed in range(5):
        stream = DEPENDENT[kind](np.random.default_rng(seed))
        seen = looks(stream)
        for label in (0, 25, 300, len(stream.label) - 1):
            assert agrees(stream, seen, label)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": np.ones(5)}, "temperature of shape"),
        ({"label": np.zeros((6, 2))}, "label of shape"),
        ({"temperature": np.zeros(6)}, "temperatures must be from"),
        ({"logits": np.full((6, 3), np.nan, dtype=np.float32)}, "logits must be finite"),
        ({"logits": np.full((6, 3), 1e60)}, "too large"),
        ({"label": np.full((6, 3), 0.5)}, "sum to 1"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    """Other lengths, temperatures or logits out of range, and labels that are no distribution are named."""
    with pytest.raises(ValueError, match=words):
        calibration(replace(rows(np.zeros((6, 3)), np.zeros(6)), **change), CLASSES, NOW)


def replayed(
    folder: Path, manifest: Manifest, make: Callable[[Readings, int], Readings]
) -> tuple[CalibrationRows, Any]:
    """Return predictions of the test engines of FD001 and FD003, every cycle labelled by its outcome."""
    engines = [history for subset in ("FD001", "FD003") for history in cmapss.read_test(folder, subset)]
    parts = predict_histories(onnx_runner(open_artefact(ARTEFACT)[0]), manifest.window or 1, engines, make=make)
    found = concatenate_rows(parts, last_only=False)
    engine = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])
    made = rows(found.logits, found.labels, engine, temperature=np.full(len(engine), manifest.temperature))
    return made, found


def test_report_on_test_engines_equals_the_evaluation(cmapss_dir: Path, manifest: Manifest) -> None:
    """On the official test engines of FD001 and FD003 the monitor is quiet, and its figures are the evaluation's."""
    made, found = replayed(cmapss_dir, manifest, every_window)
    live, table = said(made), class_metrics(found, manifest.temperature)
    assert "calibrated" == live["state"]
    losses = live["cross_entropy"]
    assert (table["cross-entropy"], table["entropy"]) == pytest.approx(
        (losses["realised"], losses["expected"]), abs=1e-6
    )
    assert (table["accuracy"], table["Brier"]) == pytest.approx((live["accuracy"], live["brier"]), abs=1e-6)
    assert table["ECE"] == pytest.approx(live["ece"]["value"], abs=1e-6)
    assert abs(losses["z_engines"]) < 1.96


def test_shifted_sensors_are_detected_on_test_engines(cmapss_dir: Path, manifest: Manifest) -> None:
    """The same engines with two sensors read two deviations too high alarm once their outcomes are in."""
    usual = np.concatenate([history.telemetry for history in cmapss.read_test(cmapss_dir, "FD001")])
    shift = np.zeros(len(CHANNELS), dtype=np.float32)
    for name in ("sensor_4", "sensor_11"):
        shift[CHANNELS.index(name)] = 2 * usual[:, CHANNELS.index(name)].std()
    made, _ = replayed(cmapss_dir, manifest, lambda telemetry, window: every_window(telemetry + shift, window))
    found = said(made)
    assert found["state"] in ("overconfident", "drifting")
    assert found["cross_entropy"]["realised"] > found["cross_entropy"]["expected"]


def test_loss_over_time_adds_up_to_the_whole() -> None:
    """Equal parts of the time from the first to the last labelled prediction; their losses are the whole's, weighed."""
    made = NOW - np.linspace(0, 900, 600)
    found = calibrated()
    found = replace(found, made_at=made, label=np.where(np.arange(600)[:, None] < 500, found.label, np.nan))
    parts = over_time(found, 4)
    whole = said(found)["cross_entropy"]
    assert (500, made[499], NOW) == (sum(one["n"] for one in parts), parts[0]["from"], parts[-1]["to"])
    assert [one["to"] for one in parts[:-1]] == [one["from"] for one in parts[1:]]
    for name in ("realised", "expected"):
        assert whole[name] == pytest.approx(sum(one["n"] * one[name] for one in parts) / 500)
    spread = np.sqrt(sum((one["n"] * one["noise"]) ** 2 for one in parts))
    assert whole["z"] == pytest.approx(500 * whole["gap"] / spread)
    empty = over_time(replace(found, made_at=np.where(np.arange(600) < 3, NOW, NOW - 900)), 3)
    assert (0, None, None) == tuple(empty[1][name] for name in ("n", "realised", "noise"))
    assert [] == over_time(replace(found, label=np.full_like(found.label, np.nan)), 4)


def test_over_time_border_belongs_to_later_period() -> None:
    """A period contains its beginning; the last contains its end as well."""
    parts = over_time(rows(np.zeros((5, 3)), np.zeros(5), made_at=NOW + np.arange(5.0)), 4)
    assert [1, 1, 1, 2] == [part["n"] for part in parts]
    assert [NOW + k for k in range(5)] == [parts[0]["from"], *(part["to"] for part in parts)]


def test_loss_over_time_of_one_class_is_zero() -> None:
    """A model of one class has a loss of 0 in each period with a label."""
    predictions = rows(np.zeros((3, 1)), [0.0, np.nan, 0.0], made_at=NOW + np.arange(3.0))
    assert [(1, 0.0), (1, 0.0)] == [(part["n"], part["realised"]) for part in over_time(predictions, 2)]
