"""References of the model card for the shipped network: other seeds, and other models trained on the same engines.

    python -m benchmarks.study seeds build/seed-*.pt        # mean and range of checkpoints written with `--output`
    python -m benchmarks.study anchor textbook-full         # one of ANCHORS; hours for the CNN-BiLSTM

Each command replaces its lines in docs/study.json. The temperature of an anchor is fitted on 10 % of the engines, which
are not used for its training.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from model import numerics
from model.contract import RUL_CAP, RUL_THRESHOLDS
from model.data import cmapss
from model.data.cmapss import History
from model.evaluation.evaluate import RunWindows, predict_histories
from model.evaluation.evaluation_metrics import class_metrics, concatenate_rows, rul_metrics
from model.model_card import RESULT_COLUMNS, torch_runner
from model.training.backbones import RollingMlp
from model.training.calibrate import calibrate_checkpoint
from model.training.cross_fit import load_checkpoint
from model.training.train import TrainingConfig, build_network, build_windows, train_network
from model.windows import Readings

STUDY = Path(__file__).parent.parent / "docs" / "study.json"
HELD_BACK = 0.1
TEXTBOOK = TrainingConfig(
    window=30,
    backbone="cnn-bilstm-attention",
    dropout=0.2,
    learning_rate=1e-3,
    late_start=0.0,
    unknown_rows=0.0,
    folds=0,
)
BOOSTING = {
    "max_iter": 250,
    "learning_rate": 0.05,
    "max_leaf_nodes": 24,
    "min_samples_leaf": 200,
    "l2_regularization": 1.0,
    "max_features": 0.3,
    "random_state": 0,
}
Line = dict[str, float | str]


def lines_of(network: str, run: RunWindows, window: int, temperature: float, subsets: tuple[str, ...]) -> list[Line]:
    """Return all metrics on the official test engines: each subset and all, every cycle and last cycles."""
    folder = cmapss.data_folder()
    parts_by_subset = {subset: predict_histories(run, window, cmapss.read_test(folder, subset)) for subset in subsets}
    if len(parts_by_subset) > 1:
        parts_by_subset["all"] = [part for parts in parts_by_subset.values() for part in parts]
    lines: list[Line] = []
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        for subset, parts in parts_by_subset.items():
            picked = concatenate_rows(parts, last_only)
            before = {"cross-entropy before T": float(numerics.cross_entropy(picked.logits, picked.labels))}
            line: Line = {"network": network, "rows": rows, "subset": subset}
            line.update(before | class_metrics(picked, temperature) | rul_metrics(picked))
            lines.append(line)
    return lines


def seeds(paths: list[Path]) -> list[Line]:
    """Return mean and range (largest minus smallest) of every metric over checkpoints."""
    each = []
    for path in paths:
        network, checkpoint = load_checkpoint(path)
        held = checkpoint["held_out"]
        engines = [h for subset in checkpoint["subsets"] for h in cmapss.read_train(cmapss.data_folder(), subset)]
        telemetry = np.concatenate([history.telemetry for history in engines]).astype(np.float64)
        t = calibrate_checkpoint(checkpoint, telemetry)["temperature"]
        print(path, f"T {t:.3f}, held-out rows {len(held['rul'])}", flush=True)
        each.append(lines_of("", torch_runner(network), network.config.window, t, cmapss.SUBSETS))
    merged: list[Line] = []
    for name, merge in ((f"mean of {len(paths)} seeds", np.mean), ("spread (largest less smallest)", np.ptp)):
        for same in zip(*each, strict=True):
            figures = {column: float(merge([line[column] for line in same])) for column in RESULT_COLUMNS}
            merged.append({"network": name, "rows": same[0]["rows"], "subset": same[0]["subset"]} | figures)
    return merged


def _split_train_engines(subsets: tuple[str, ...]) -> tuple[list[History], list[History]]:
    parts = [
        cmapss.split_engines(cmapss.read_train(cmapss.data_folder(), s), (1 - HELD_BACK, HELD_BACK), 0) for s in subsets
    ]
    return [h for part in parts for h in part[0]], [h for part in parts for h in part[1]]


def _fit_temperature(run: RunWindows, window: int, engines: list[History]) -> float:
    held = concatenate_rows(predict_histories(run, window, engines), last_only=False)
    weights = np.concatenate([cmapss.cutoff_weights(history) for history in engines])
    return numerics.fit_temperature(held.logits, held.labels, weights)


def textbook(hidden: int, epochs: int, subsets: tuple[str, ...]) -> list[Line]:
    """Train the CNN-BiLSTM of a given width on 90 % of the engines and evaluate it."""
    config = TrainingConfig(**vars(TEXTBOOK) | {"hidden": hidden, "epochs": epochs})
    learn, held = _split_train_engines(subsets)
    network = build_network(learn, config)
    train_network(network, build_windows(learn, network), config, f"textbook {hidden}")
    run = torch_runner(network)
    name = f"textbook, width {hidden}, {epochs} epochs, window {config.window}"
    return lines_of(name, run, config.window, _fit_temperature(run, config.window, held), subsets)


def boosting(subsets: tuple[str, ...]) -> list[Line]:
    """Train and evaluate gradient boosting on the features of the compact network: normalised rolling means."""
    learn, held = _split_train_engines(subsets)
    network = build_network(learn, TrainingConfig(folds=0))
    means, windows = network.backbone, build_windows(learn, network)
    assert isinstance(means, RollingMlp)
    with torch.inference_mode():
        picks = torch.split(torch.arange(len(windows.first)), 4096)
        x = torch.cat([means.features(windows.select(picked)) for picked in picks]).numpy()
    rul, weights = windows.rul.numpy(), windows.weight.numpy()
    remaining = HistGradientBoostingRegressor(**BOOSTING).fit(x, np.minimum(rul, RUL_CAP), weights)
    health = HistGradientBoostingClassifier(**BOOSTING).fit(x, cmapss.health_classes(rul, RUL_THRESHOLDS), weights)

    def run(telemetry: Readings) -> tuple[Readings, Readings]:
        raw = torch.tensor(telemetry)
        with torch.inference_mode():
            features = means.features(network.normalise(raw)).numpy()
        return np.log(np.clip(health.predict_proba(features), 1e-9, 1)), remaining.predict(features)

    window = network.config.window
    return lines_of("gradient boosting", run, window, _fit_temperature(run, window, held), subsets)


ANCHORS: dict[str, Callable[[], list[Line]]] = {
    "textbook-full": lambda: textbook(256, 4, ("FD001",)),
    "textbook-64": lambda: textbook(64, 6, cmapss.SUBSETS),
    "boosting": lambda: boosting(cmapss.SUBSETS),
}


def main() -> None:
    """Run one part of the study and store its lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("seeds").add_argument("checkpoints", type=Path, nargs="+")
    parts.add_parser("anchor").add_argument("name", choices=ANCHORS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    name = flags.part if flags.part == "seeds" else flags.name
    lines = seeds(flags.checkpoints) if flags.part == "seeds" else ANCHORS[name]()
    stored_lines = json.loads(STUDY.read_text()) if STUDY.exists() else {}
    STUDY.write_text(json.dumps(stored_lines | {name: lines}, indent=1) + "\n")
    print(f"{name}: {time.monotonic() - started:.0f} s, wrote {STUDY}")


if __name__ == "__main__":
    main()
