"""The results table: the artefact on the official test engines, before and after temperature.

    python -m model.evaluation.evaluate [artefact]         # = make evaluate

The test engines are read here and nowhere else in training: nothing is chosen by them.
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
from model.evaluation.evaluation_metrics import Answers, of_classes, of_rul, rows_of
from model.windows import Readings, every_window

ARTEFACT = Path(__file__).parents[1] / "artefact" / "engine-health.onnx"
BATCH = 256
BySubset = dict[str, list[Answers]]
MakeWindows = Callable[[Readings, int], Readings]
Run = Callable[[Readings], tuple[Readings, Readings]]  # windows (N, T, 17) to logits (N, C) and RUL (N,)
COLUMNS = {  # of the tables, with the decimals that they show
    "n": 0,
    "accuracy": 4,
    "macro-F1": 4,
    "cross-entropy": 4,
    "ECE": 4,
    "Brier": 4,
    "RUL RMSE": 2,
    "NASA score": 0,
}


def answers(
    run: Run,
    window: int,
    engines: list[History],
    thresholds: tuple[float, ...] = contract.RUL_THRESHOLDS,
    make: MakeWindows = every_window,
) -> list[Answers]:
    """What a network says of every cycle of each engine, one entry an engine; `make` turns histories to windows."""
    found = []
    for history in engines:
        windows = make(history.telemetry, window)
        parts = [run(np.ascontiguousarray(windows[i : i + BATCH])) for i in range(0, len(windows), BATCH)]
        logits, rul = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
        true_rul = history.known_rul()
        found.append(Answers(logits, cmapss.health(true_rul, thresholds), rul, true_rul))
    return found


def by_subset(run: Run, window: int, folder: Path, thresholds: tuple[float, ...] = contract.RUL_THRESHOLDS) -> BySubset:
    """Answers for the official test engines of each subset, and of all of them."""
    found = {s: answers(run, window, cmapss.read_test(folder, s), thresholds) for s in cmapss.SUBSETS}
    return found | {"all": [part for parts in found.values() for part in parts]}


def cells(line: dict[str, float], columns: dict[str, int]) -> str:
    """The cells of a line of Markdown."""
    return " | ".join(f"{line[name]:.{decimals}f}" for name, decimals in columns.items())


def header(first: str, columns: dict[str, int]) -> list[str]:
    """The two lines above a table of Markdown; `first` names the columns before the figures, as in `rows | subset`."""
    return [f"| {first} | " + " | ".join(columns) + " |", "|" + " --- |" * (first.count("|") + 1 + len(columns))]


def table(folder: Path, session: ort.InferenceSession, manifest: Manifest) -> Iterator[str]:
    """The results as lines of Markdown."""
    found = by_subset(runner(session), manifest.window or 1, folder, manifest.rul_thresholds or contract.RUL_THRESHOLDS)
    yield from header("rows | subset | T", COLUMNS)
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        for subset, parts in found.items():
            for t in (1.0, manifest.temperature):
                picked = rows_of(parts, last_only)
                yield f"| {rows} | {subset} | {t:.3f} | {cells(of_classes(picked, t) | of_rul(picked), COLUMNS)} |"


def runner(session: ort.InferenceSession) -> Run:
    """ONNX Runtime as a function of windows."""

    def run(windows: Readings) -> tuple[Readings, Readings]:
        logits, rul = session.run([contract.LOGITS, contract.RUL], {contract.INPUT: windows})
        return logits, rul

    return run


def open_artefact(path: Path) -> tuple[ort.InferenceSession, Manifest]:
    """The session and the manifest; serving's stricter proof is not needed to measure.

    Raises:
        ContractError: not an ONNX file, or one without a manifest.
    """
    try:
        session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for each way a file can be broken
        raise ContractError(f"{path}: {str(error).splitlines()[0]}") from None
    return session, contract.parse_manifest(session.get_modelmeta().custom_metadata_map.get(contract.MANIFEST_KEY, ""))


def main() -> None:
    """Print the table of the given artefact, or of the committed one."""
    parser = argparse.ArgumentParser(description="Evaluate an artefact on the official test engines.")
    parser.add_argument("artefact", type=Path, nargs="?", default=ARTEFACT)
    try:
        for line in table(cmapss.data_folder(), *open_artefact(parser.parse_args().artefact)):
            print(line, flush=True)
    except (DataError, ContractError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
