"""Measure batch invariance: whether a row has the same output in any batch. Used by export, attach and serving.

Exporters may fix batch sizes and recurrent states without a warning. Independent of ONNX Runtime and torch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
RunBatch = Callable[[npt.NDArray[np.float32]], Sequence[Array]]


def run_alone(run: RunBatch, rows: npt.NDArray[np.float32]) -> list[Array]:
    """Return the outputs of N rows, each run as a batch of one, concatenated over rows."""
    parts = [run(rows[i : i + 1]) for i in range(len(rows))]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def max_difference(
    run: RunBatch,
    rows: npt.NDArray[np.float32],
    expected: Sequence[Array],
    batches: Iterable[npt.NDArray[np.integer]],
    units: Sequence[float | Array],
) -> float:
    """Return the largest difference between outputs of rows in batches and the expected outputs of the same rows.

    Args:
        run: maps a batch (B, ...) to outputs, each with B rows.
        rows: (N, ...).
        expected: one array of N rows per output.
        batches: indices of the rows of each batch.
        units: what a difference of each output is divided by, a number or one per row (N, 1).

    Returns:
        NaN if any output is NaN; infinity if an output has another shape than expected.
    """
    worst = 0.0
    for indices in batches:
        for output, target, unit in zip(run(rows[indices]), expected, units, strict=True):
            if output.shape != target[indices].shape:
                return float("inf")
            scale = unit if isinstance(unit, float | int) else unit[indices]
            worst = float(np.maximum(worst, np.abs((output.astype(np.float64) - target[indices]) / scale).max()))
    return worst
