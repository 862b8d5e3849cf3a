"""The results table: the artefact on the official test engines, before and after temperature.

    python -m model.evaluate [artefact]         # = make evaluate

The test engines are read here and nowhere else in training: nothing is chosen by them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model import cmapss, contract, numerics
from model.cmapss import DataError, History
from model.contract import ContractError, Manifest
from model.numerics import Floats
from model.windows import every_window

ARTEFACT = Path(__file__).parent / "artefact" / "engine-health.onnx"
BATCH = 256


class Answers(NamedTuple):
    """What the artefact says of some rows, and what is true: logits (N, C), labels (N,), RUL (N,) cycles."""

    logits: Floats
    labels: npt.NDArray[np.int64]
    rul: Floats
    true_rul: Floats


def macro_f1(predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], classes: int) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); a class neither predicted nor true counts 0."""
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    sizes = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    return float(np.mean(2 * hits / np.maximum(sizes, 1)))


def nasa_score(rul: Floats, true_rul: Floats) -> float:
    """Σ exp(-d/13) - 1 where d = predicted - true < 0, exp(d/10) - 1 else (Saxena et al. 2008): late costs more."""
    d = rul - true_rul
    return float(np.expm1(np.where(d < 0, -d / 13, d / 10)).sum())


def answers(session: ort.InferenceSession, manifest: Manifest, engines: list[History]) -> list[Answers]:
    """The artefact's answers for every cycle of every engine, one entry an engine."""
    found = []
    for history in engines:
        windows = every_window(history.telemetry, manifest.window or 1)
        parts = [
            session.run(["logits", "rul"], {"telemetry": np.ascontiguousarray(windows[i : i + BATCH])})
            for i in range(0, len(windows), BATCH)
        ]
        logits, rul = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
        true_rul = history.known_rul()
        labels = cmapss.health(true_rul, manifest.rul_thresholds or contract.RUL_THRESHOLDS)
        found.append(Answers(logits, labels, rul, true_rul))
    return found


def rows_of(parts: list[Answers], last_only: bool) -> Answers:
    """All rows of some engines, or only their last."""
    return Answers(
        *(
            np.concatenate([column[-1:] if last_only else column for column in columns])
            for columns in zip(*parts, strict=True)
        )
    )


def measures(found: Answers, temperature: float) -> dict[str, float]:
    """One line of the table; RUL errors against the truth capped at 125 cycles, as the literature has it."""
    capped = np.minimum(found.true_rul, contract.RUL_CAP)
    return {
        "n": len(found.labels),
        "accuracy": float(numerics.correct(found.logits, found.labels).mean()),
        "macro-F1": macro_f1(found.logits.argmax(axis=1), found.labels, found.logits.shape[1]),
        "cross-entropy": float(numerics.cross_entropy(found.logits, found.labels, temperature)),
        "ECE": numerics.ece(found.logits, found.labels, temperature),
        "Brier": float(numerics.brier(found.logits, found.labels, temperature).mean()),
        "RUL RMSE": float(np.sqrt(((found.rul - capped) ** 2).mean())),
        "NASA score": nasa_score(found.rul, capped),
    }


def table(folder: Path, session: ort.InferenceSession, manifest: Manifest) -> Iterator[str]:
    """The results as lines of Markdown."""
    by_subset = {s: answers(session, manifest, cmapss.read_test(folder, s)) for s in cmapss.SUBSETS}
    by_subset["all"] = [part for parts in by_subset.values() for part in parts]
    columns = ("n", "accuracy", "macro-F1", "cross-entropy", "ECE", "Brier", "RUL RMSE", "NASA score")
    yield "| rows | subset | T | " + " | ".join(columns) + " |"
    yield "| --- | --- | --- |" + " --- |" * len(columns)
    for rows, last_only in (("every cycle", False), ("last cycle", True)):
        for subset, parts in by_subset.items():
            for t in (1.0, manifest.temperature):
                found = measures(rows_of(parts, last_only), t)
                cells = [f"{found['n']:.0f}", *(f"{found[name]:.4f}" for name in columns[1:6])]
                cells += [f"{found['RUL RMSE']:.2f}", f"{found['NASA score']:.0f}"]
                yield f"| {rows} | {subset} | {t:.3f} | " + " | ".join(cells) + " |"


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
