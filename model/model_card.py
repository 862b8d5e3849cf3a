"""Tables of the model card in Markdown, measured on the official test engines.

`docs/card.py` writes them to docs/model-card.md, the second step of `make evaluate`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import torch

from model import contract, numerics
from model.contract import Manifest
from model.data import cmapss
from model.evaluation import conformal
from model.evaluation.evaluate import (
    RowsBySubset,
    RunWindows,
    format_cells,
    format_header,
    onnx_runner,
    predict_test_engines,
)
from model.evaluation.evaluation_metrics import EvaluatedRows, class_metrics, concatenate_rows, rul_metrics, set_metrics
from model.evaluation.occlusion import ConditionBaselines, attribute_channels, occlude_channels
from model.numerics import Floats
from model.training.calibrate import OTHER_THRESHOLDS
from model.training.network import EngineHealth, NetworkConfig
from model.windows import Readings, pad_left

RESULT_COLUMNS = {
    "n": 0,
    "accuracy": 4,
    "macro-F1": 4,
    "critical recall": 4,
    "two-step errors": 4,
    "cross-entropy before T": 4,
    "cross-entropy": 4,
    "ECE": 4,
    "ECE low": 4,
    "ECE high": 4,
    "Brier": 4,
    "RUL RMSE": 2,
    "raw RMSE": 2,
    "NASA score": 0,
}
RUL_BANDS = ((50, 75), (75, 100), (100, 125))  # cycles of RUL, compared with `normal`


def results_table(by_subset: RowsBySubset, temperature: float) -> Iterator[str]:
    """Yield all metrics of all subsets, on every cycle and on last cycles."""
    yield from format_header("rows | subset", RESULT_COLUMNS)
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        for subset, parts in by_subset.items():
            evaluated = concatenate_rows(parts, last_only)
            line = class_metrics(evaluated, temperature) | rul_metrics(evaluated)
            before = {"cross-entropy before T": float(numerics.cross_entropy(evaluated.logits, evaluated.labels))}
            yield f"| {rows} | {subset} | {format_cells(line | before, RESULT_COLUMNS)} |"


def coverage_table(by_subset: RowsBySubset, manifest: Manifest) -> Iterator[str]:
    """Yield coverage and size of prediction sets with both scores, per subset and class."""
    columns = {f"{m} {name}": d for m in ("LAC", "APS") for name, d in (("coverage", 3), ("set size", 3))}
    assert manifest.conformal is not None
    limits = (manifest.conformal.threshold, manifest.training["alternatives"]["aps_threshold"])
    yield from format_header("rows | of | n", columns)
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        groups = {subset: concatenate_rows(parts, last_only) for subset, parts in by_subset.items()}
        everything = groups["all"]
        for k, name in enumerate(manifest.classes):
            groups[name] = EvaluatedRows(*(column[everything.labels == k] for column in everything))
        for group, evaluated in groups.items():
            line: dict[str, float] = {}
            for method, limit in zip(get_args(conformal.Method), limits, strict=True):
                sets = conformal.prediction_sets(evaluated.logits, manifest.temperature, limit, method)
                line |= {
                    f"{method.upper()} {name}": value for name, value in set_metrics(evaluated.labels, sets).items()
                }
            yield f"| {rows} | {group} | {len(evaluated.labels)} | {format_cells(line, columns)} |"


def scalings_table(manifest: Manifest) -> Iterator[str]:
    """Yield the cross-entropy of scalings, fitted on half of the held-out engines and evaluated on the others."""
    yield "| scaling | cross-entropy on the other engines |"
    yield "| --- | --- |"
    for name, value in manifest.training["alternatives"]["cross_entropy_of_scalings"].items():
        yield f"| {name} | {value:.4f} |"


def attribution_table(session: ort.InferenceSession, manifest: Manifest, folder: Path) -> Iterator[str]:
    """Yield the mean shift of the last prediction of test engines by occlusion of each channel, by class."""
    assert manifest.conditions is not None
    assert manifest.window is not None
    baselines, run = (
        ConditionBaselines.from_lists(manifest.conditions.setting_scales, manifest.conditions.usual),
        onnx_runner(session),
    )
    shift_sums = np.zeros((len(manifest.classes), len(manifest.channels)))
    count = np.zeros(len(manifest.classes))
    for subset in cmapss.SUBSETS:
        for history in cmapss.read_test(folder, subset):
            window = pad_left(history.telemetry, manifest.window)
            logits, rul = run(np.concatenate([window[None], occlude_channels(window, baselines)]))
            p = numerics.softmax(logits, manifest.temperature)
            top = int(p[0].argmax())
            count[top] += 1
            for row in attribute_channels(p[0], float(rul[0]), p[1:], rul[1:]):
                shift_sums[top, row.channel] += row.shift
    mean = shift_sums / np.maximum(count, 1)[:, None]
    columns = {f"{name} (n = {n:.0f})": 3 for name, n in zip(manifest.classes, count, strict=True)}
    yield from format_header("channel", columns)
    for k in np.argsort(-mean.sum(axis=0)):
        channel = manifest.channels[k]
        cells = format_cells(dict(zip(columns, mean[:, k], strict=True)), columns)
        yield f"| {channel.name} ({channel.description}) | {cells} |"


def separability_table(by_subset: RowsBySubset) -> Iterator[str]:
    """Yield the area under the ROC curve of P(normal) for RUL over 125 against each lower band."""
    yield "| normal (RUL > 125) against RUL of | area under the ROC curve |"
    yield "| --- | --- |"
    rows = concatenate_rows(by_subset["all"], last_only=False)
    p = numerics.softmax(rows.logits)[:, 0]
    for low, high in RUL_BANDS:
        other = p[(rows.true_rul > low) & (rows.true_rul <= high)]
        yield f"| {low} to {high} cycles | {area_under_roc(p[rows.true_rul > contract.RUL_CAP], other):.3f} |"


def area_under_roc(positive: Floats, negative: Floats) -> float:
    """Return P(a positive scores above a negative); ties count half (Mann and Whitney 1947)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / 2 / len(negative))


def other_thresholds_table(artefact: Path, manifest: Manifest, folder: Path) -> Iterator[str]:
    """Yield the results of the same weights with class boundaries 80/30, another grouping of the RUL bins."""
    checkpoint = torch.load(artefact.with_suffix(".pt"), weights_only=True)
    network = EngineHealth(NetworkConfig(**checkpoint["network"] | {"thresholds": OTHER_THRESHOLDS}))
    network.load_state_dict(checkpoint["weights"])
    by_subset = predict_test_engines(torch_runner(network), network.config.window, folder, OTHER_THRESHOLDS)
    return results_table(by_subset, manifest.training["alternatives"]["temperature_80_30"])


def torch_runner(network: torch.nn.Module) -> RunWindows:
    """Wrap a torch network as a function of windows."""
    network.eval()

    def run(windows: Readings) -> tuple[Readings, Readings]:
        with torch.inference_mode():
            logits, rul = network(torch.tensor(windows))
        return logits.numpy(), rul.numpy()

    return run


def study_table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the results of other networks from `make study`, with mean and standard deviation over seeds."""
    yield from format_header("network | rows | subset", RESULT_COLUMNS)
    for line in lines:
        yield f"| {line['network']} | {line['rows']} | {line['subset']} | {format_cells(line, RESULT_COLUMNS)} |"
