from pathlib import Path

import numpy as np
import pytest

from model import numerics
from model.contract import CHANNELS, Manifest
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, onnx_runner, open_artefact, predict_histories
from model.evaluation.evaluation_metrics import concatenate_rows
from model.evaluation.robustness import HELD_ROWS, STRONGEST, Disturbances, build_scenarios, keep_newest
from model.windows import every_window

HELD = CHANNELS.index(STRONGEST[0])


@pytest.fixture(scope="module")
def engines(cmapss_dir: Path) -> list[cmapss.History]:
    """A tenth of the official test engines of every subset."""
    return [history for subset in cmapss.SUBSETS for history in cmapss.read_test(cmapss_dir, subset)[::10]]


def test_disturbances_change_only_their_sensors(engines: list[cmapss.History], manifest: Manifest) -> None:
    """Held sensors repeat their last value, bias is in deviations, and cut histories repeat their oldest row."""
    assert manifest.conditions is not None
    raw, window = engines[0].telemetry, manifest.window or 1
    clean, disturbances = every_window(raw, window), Disturbances(manifest.conditions)
    held = disturbances.hold_sensors(STRONGEST[:1])(raw, window)
    assert (held[:, -HELD_ROWS:, HELD] == clean[:, [-HELD_ROWS - 1], HELD]).all()
    np.testing.assert_array_equal(np.delete(clean, HELD, axis=2), np.delete(held, HELD, axis=2))
    bias = disturbances.bias_sensors(STRONGEST[:1], 2.0)(raw, window)[..., HELD] - clean[..., HELD]
    np.testing.assert_allclose(2 * disturbances.row_deviations(raw)[-1, HELD - 3], bias, rtol=1e-3)
    assert (keep_newest(5)(raw, window)[:, :-5] == clean[:, [-5]]).all()
    noisy = disturbances.double_noise(raw, window)
    np.testing.assert_array_equal(clean[..., :3], noisy[..., :3])
    assert (clean[..., 3:] != noisy[..., 3:]).any(axis=(0, 1)).all()


def test_uncertainty_rises_where_accuracy_falls(engines: list[cmapss.History], manifest: Manifest) -> None:
    """Every disturbance that lowers accuracy raises the expected loss."""
    assert manifest.conditions is not None
    run, results = onnx_runner(open_artefact(ARTEFACT)[0]), {}
    for name, make in build_scenarios(manifest.conditions).items():
        rows = concatenate_rows(predict_histories(run, manifest.window or 1, engines, make=make), last_only=False)
        accuracy = float((rows.logits.argmax(1) == rows.labels).mean())
        results[name] = accuracy, float(numerics.entropy(rows.logits, manifest.temperature).mean())
    accuracy, entropy = results.pop("as measured")
    fallen = {name: pair for name, pair in results.items() if pair[0] < accuracy - 0.03}
    assert len(fallen) > 3
    assert {} == {name: pair for name, pair in fallen.items() if pair[1] <= entropy}
