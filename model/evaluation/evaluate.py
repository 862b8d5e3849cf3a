"""Evaluate the artefact on the official test engines, before and after temperature scaling.

    python -m model.evaluation.evaluate [artefact]         # = make evaluate

The test engines are used for evaluation only. No parameter is selected with them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort

from model import contract
from model.contract import ContractError, Manifest
from model.data import cmapss
from model.data.cmapss import DataError, History
from model.evaluation.evaluation_metrics import EvaluatedRows, class_metrics, concatenate_rows, rul_metrics
from model.windows import Readings, every_window

ARTEFACT = Path(__file__).parents[1] / "artefact" / "engine-health.onnx"
BATCH = 256
RowsBySubset = dict[str, list[EvaluatedRows]]
MakeWindows = Callable[[Readings, int], Readings]
RunWindows = Callable[[Readings], tuple[Readings, Readings]]  # windows (N, T, 17) to logits (N, C) and RUL (N,)
COLUMNS = {  # of the tables, with their number of decimals
    "n": 0,
    "accuracy": 4,
    "macro-F1": 4,
    "cross-entropy": 4,
    "ECE": 4,
    "Brier": 4,
    "RUL RMSE": 2,
    "NASA score": 0,
}


def predict_histories(
    run: RunWindows,
    window: int,
    engines: list[History],
    thresholds: tuple[float, ...] = contract.RUL_THRESHOLDS,
    make: MakeWindows = every_window,
) -> list[EvaluatedRows]:
    """Predict every cycle of each engine; one result per engine. `make` converts a history to windows."""
    predictions = []
    for history in engines:
        windows = make(history.telemetry, window)
        parts = [run(np.ascontiguousarray(windows[i : i + BATCH])) for i in range(0, len(windows), BATCH)]
        logits, rul = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
        true_rul = history.require_rul()
        predictions.append(EvaluatedRows(logits, cmapss.health_classes(true_rul, thresholds), rul, true_rul))
    return predictions


def predict_test_engines(
    run: RunWindows, window: int, folder: Path, thresholds: tuple[float, ...] = contract.RUL_THRESHOLDS
) -> RowsBySubset:
    """Predict the official test engines. Keys are the subsets and `all`."""
    by_subset = {s: predict_histories(run, window, cmapss.read_test(folder, s), thresholds) for s in cmapss.SUBSETS}
    return by_subset | {"all": [part for parts in by_subset.values() for part in parts]}


def format_cells(line: dict[str, float], columns: dict[str, int]) -> str:
    """Format the cells of a row of a Markdown table."""
    return " | ".join(f"{line[name]:.{decimals}f}" for name, decimals in columns.items())


def format_header(first: str, columns: dict[str, int]) -> list[str]:
    """Return the two header lines of a Markdown table. `first` are the leading columns, such as `rows | subset`."""
    return [f"| {first} | " + " | ".join(columns) + " |", "|" + " --- |" * (first.count("|") + 1 + len(columns))]


def results_table(folder: Path, session: ort.InferenceSession, manifest: Manifest) -> Iterator[str]:
    """Yield the lines of the results table in Markdown."""
    by_subset = predict_test_engines(
        onnx_runner(session), manifest.window or 1, folder, manifest.rul_thresholds or contract.RUL_THRESHOLDS
    )
    yield from format_header("rows | subset | T", COLUMNS)
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        for subset, parts in by_subset.items():
            for t in (1.0, manifest.temperature):
                evaluated = concatenate_rows(parts, last_only)
                cells = format_cells(class_metrics(evaluated, t) | rul_metrics(evaluated), COLUMNS)
                yield f"| {rows} | {subset} | {t:.3f} | {cells} |"


def onnx_runner(session: ort.InferenceSession) -> RunWindows:
    """Wrap an ONNX Runtime session as a function of windows."""

    def run(windows: Readings) -> tuple[Readings, Readings]:
        logits, rul = session.run([contract.LOGITS, contract.RUL], {contract.INPUT: windows})
        return logits, rul

    return run


def open_artefact(path: Path) -> tuple[ort.InferenceSession, Manifest]:
    """Open session and manifest of an artefact, without the verification that serving does.

    Raises:
        ContractError: the file is not ONNX, or has no manifest.
    """
    try:
        session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a separate exception class per kind of defect
        raise ContractError(f"{path}: {str(error).splitlines()[0]}") from None
    return session, contract.parse_manifest(session.get_modelmeta().custom_metadata_map.get(contract.MANIFEST_KEY, ""))


def main() -> None:
    """Print the results table of the given artefact; the bundled one is the default."""
    parser = argparse.ArgumentParser(description="Evaluate an artefact on the official test engines.")
    parser.add_argument("artefact", type=Path, nargs="?", default=ARTEFACT)
    try:
        for line in results_table(cmapss.data_folder(), *open_artefact(parser.parse_args().artefact)):
            print(line, flush=True)
    except (DataError, ContractError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
