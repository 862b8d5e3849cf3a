"""The tables of the model card, each measured anew on the official test engines: lines of Markdown.

`docs/card.py` puts them into docs/model-card.md, the second half of `make evaluate`.
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
from model.evaluation.evaluate import BySubset, Run, by_subset, cells, header, runner
from model.evaluation.evaluation_metrics import Answers, of_classes, of_rul, of_sets, rows_of
from model.evaluation.occlusion import Usual, occluded, shifts
from model.numerics import Floats
from model.training.calibrate import OTHER_THRESHOLDS
from model.training.network import EngineHealth, NetworkConfig
from model.windows import Readings, pad_left

RESULTS = {
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
BANDS = ((50, 75), (75, 100), (100, 125))  # cycles of RUL, to ask how well `normal` can be told from them


def results(found: BySubset, temperature: float) -> Iterator[str]:
    """Every measure of every subset, on every cycle and on last cycles."""
    yield from header("rows | subset", RESULTS)
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        for subset, parts in found.items():
            picked = rows_of(parts, last_only)
            line = of_classes(picked, temperature) | of_rul(picked)
            before = {"cross-entropy before T": float(numerics.cross_entropy(picked.logits, picked.labels))}
            yield f"| {rows} | {subset} | {cells(line | before, RESULTS)} |"


def coverage(found: BySubset, manifest: Manifest) -> Iterator[str]:
    """Coverage and size of prediction sets by both scores, for each subset and each class."""
    columns = {f"{m} {name}": d for m in ("LAC", "APS") for name, d in (("coverage", 3), ("set size", 3))}
    assert manifest.conformal is not None
    limits = (manifest.conformal.threshold, manifest.training["alternatives"]["aps_threshold"])
    yield from header("rows | of | n", columns)
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        groups = {subset: rows_of(parts, last_only) for subset, parts in found.items()}
        everything = groups["all"]
        for k, name in enumerate(manifest.classes):
            groups[name] = Answers(*(column[everything.labels == k] for column in everything))
        for group, picked in groups.items():
            line: dict[str, float] = {}
            for method, limit in zip(get_args(conformal.Method), limits, strict=True):
                sets = conformal.sets(picked.logits, manifest.temperature, limit, method)
                line |= {f"{method.upper()} {name}": value for name, value in of_sets(picked.labels, sets).items()}
            yield f"| {rows} | {group} | {len(picked.labels)} | {cells(line, columns)} |"


def scalings(manifest: Manifest) -> Iterator[str]:
    """Cross-entropy of scalings fitted on half of the held-out engines and scored on the others."""
    yield "| scaling | cross-entropy on the other engines |"
    yield "| --- | --- |"
    for name, value in manifest.training["alternatives"]["cross_entropy_of_scalings"].items():
        yield f"| {name} | {value:.4f} |"


def attribution(session: ort.InferenceSession, manifest: Manifest, folder: Path) -> Iterator[str]:
    """Mean shift of the last answer of each test engine when a channel tells nothing, by predicted class."""
    assert manifest.conditions is not None
    assert manifest.window is not None
    usual, run = Usual.of(manifest.conditions.setting_scales, manifest.conditions.usual), runner(session)
    total = np.zeros((len(manifest.classes), len(manifest.channels)))
    count = np.zeros(len(manifest.classes))
    for subset in cmapss.SUBSETS:
        for history in cmapss.read_test(folder, subset):
            window = pad_left(history.telemetry, manifest.window)
            logits, rul = run(np.concatenate([window[None], occluded(window, usual)]))
            p = numerics.softmax(logits, manifest.temperature)
            top = int(p[0].argmax())
            count[top] += 1
            for row in shifts(p[0], float(rul[0]), p[1:], rul[1:]):
                total[top, row.channel] += row.shift
    mean = total / np.maximum(count, 1)[:, None]
    columns = {f"{name} (n = {n:.0f})": 3 for name, n in zip(manifest.classes, count, strict=True)}
    yield from header("channel", columns)
    for k in np.argsort(-mean.sum(axis=0)):
        about = manifest.channels[k]
        yield f"| {about.name} ({about.description}) | {cells(dict(zip(columns, mean[:, k], strict=True)), columns)} |"


def limits_of_telling(found: BySubset) -> Iterator[str]:
    """How often a row with RUL over 125 gets more P(normal) than one of a lower band (area under the ROC curve)."""
    yield "| normal (RUL > 125) against RUL of | area under the ROC curve |"
    yield "| --- | --- |"
    rows = rows_of(found["all"], last_only=False)
    p = numerics.softmax(rows.logits)[:, 0]
    for low, high in BANDS:
        other = p[(rows.true_rul > low) & (rows.true_rul <= high)]
        yield f"| {low} to {high} cycles | {area_under_roc(p[rows.true_rul > contract.RUL_CAP], other):.3f} |"


def area_under_roc(positive: Floats, negative: Floats) -> float:
    """P(a positive scores above a negative), ties counting half (Mann and Whitney 1947)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / 2 / len(negative))


def other_thresholds(artefact: Path, manifest: Manifest, folder: Path) -> Iterator[str]:
    """The same weights with the class boundaries 80/30: no training, another grouping of the same RUL bins."""
    stored = torch.load(artefact.with_suffix(".pt"), weights_only=True)
    network = EngineHealth(NetworkConfig(**stored["network"] | {"thresholds": OTHER_THRESHOLDS}))
    network.load_state_dict(stored["weights"])
    found = by_subset(torch_runner(network), network.config.window, folder, OTHER_THRESHOLDS)
    return results(found, manifest.training["alternatives"]["temperature_80_30"])


def torch_runner(network: torch.nn.Module) -> Run:
    """A torch network as a function of windows."""
    network.eval()

    def run(windows: Readings) -> tuple[Readings, Readings]:
        with torch.inference_mode():
            logits, rul = network(torch.tensor(windows))
        return logits.numpy(), rul.numpy()

    return run


def study(lines: list[dict[str, Any]]) -> Iterator[str]:
    """What `make study` found of other networks, and the mean and spread of seeds."""
    yield from header("network | rows | subset", RESULTS)
    for line in lines:
        yield f"| {line['network']} | {line['rows']} | {line['subset']} | {cells(line, RESULTS)} |"
