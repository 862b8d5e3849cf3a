"""Score units of rows with the arithmetic of the service.

Each batch runs on one thread, and several batches run concurrently. So results do not depend on the number of cores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from model import numerics
from model.numerics import Floats
from model.windows import overlapping
from service.inference.onnx_model import Batch, Model
from service.inference.overlap_graph import MAX_CALL_ROWS, MAX_OVERLAP_WINDOWS, OverlapGraph
from service.inference.predictions import (
    Predictions,
    calibrate,
    calibrate_outputs,
    concatenate_predictions,
    predict_windows,
    select_rows,
)
from service.inference.predictor import FLOAT32_MAX
from service.scoring.rows import Reject
from service.scoring.window_assembly import Integers, WorkUnit

BATCH_WINDOWS = 64  # windows of one inference, as in the service; the fastest size for the bundled model
MAX_ROWS_PER_WINDOW = 16  # with more rows per window, separate windows are faster
NO_ANSWER = "the prediction for these readings is not finite"


@dataclass
class Scored:
    """A unit with its predictions. Rows without a finite prediction are excluded and listed."""

    unit: WorkUnit
    answers: Predictions
    loss: Floats | None  # (N,) NaN without a label; None if the job has no labels
    finite_rows: Integers  # rows of the unit that have predictions
    unanswered: list[Reject]


class Scorer:
    """Model at one temperature, with its overlap graph if it has one. Both give the same bits."""

    def __init__(self, model: Model, temperature: float, overlap_graph: OverlapGraph | None = None) -> None:
        self.model, self.temperature, self.overlap_graph = model, temperature, overlap_graph

    def inference_calls(self, unit: WorkUnit) -> "list[Callable[[], Predictions]]":
        """Return calls that together predict a unit. Each may run on any thread.

        `join_answers` takes their results in order.
        """
        if self._uses_overlap_graph(unit):
            return [
                partial(self._answer_overlapping, unit.flat, starts) for starts in _group_starts(np.sort(unit.starts))
            ]
        windows = overlapping(unit.flat, self.model.manifest.window or 1)
        return [
            partial(self._answer_windows, windows, unit.starts[i : i + BATCH_WINDOWS])
            for i in _slice_starts(unit.starts, BATCH_WINDOWS)
        ]

    def join_answers(self, unit: WorkUnit, parts: list[Predictions]) -> Predictions:
        """Return the predictions of a unit in the order of its rows."""
        answers = concatenate_predictions(parts or [self._empty_answers()])
        if not self._uses_overlap_graph(unit):
            return answers
        order = np.argsort(unit.starts, kind="stable")
        if (order[1:] > order[:-1]).all():
            return answers
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return select_rows(answers, rank)

    def _uses_overlap_graph(self, unit: WorkUnit) -> bool:
        return self.overlap_graph is not None and len(unit.flat) <= MAX_ROWS_PER_WINDOW * len(unit.starts)

    def _answer_windows(self, windows: Batch, starts: Integers) -> Predictions:
        """Copy separate windows into one batch and predict it."""
        shape = (len(starts), *self.model.input_shape)
        return predict_windows(self.model, np.ascontiguousarray(windows[starts]).reshape(shape), self.temperature)

    def _answer_overlapping(self, flat: Batch, starts: Integers) -> Predictions:
        """Predict overlapping windows, sorted by start, with the overlap graph."""
        assert self.overlap_graph is not None  # `_uses_overlap_graph` has checked this
        begin, end = starts[0], starts[-1] + self.overlap_graph.window
        outputs = self.overlap_graph.answers(flat[begin:end], starts - begin, BATCH_WINDOWS)
        return calibrate_outputs(self.model, outputs, self.temperature)

    def finish_unit(self, unit: WorkUnit, answers: Predictions, files: list[str], labelled: bool) -> Scored:
        """Return a unit with its finite predictions and the losses of labelled rows."""
        finite_rows = np.flatnonzero(answers.finite)
        not_finite = np.flatnonzero(~answers.finite).tolist()
        unanswered = [Reject(int(unit.row[i]), files[unit.file[i]], NO_ANSWER) for i in not_finite]
        if not_finite:
            answers = select_rows(answers, finite_rows)
        loss = self._compute_losses(answers, unit.label[finite_rows]) if labelled else None
        return Scored(unit, answers, loss, finite_rows, unanswered)

    def _empty_answers(self) -> Predictions:
        manifest = self.model.manifest
        rul = None if manifest.rul_thresholds is None else np.empty(0, np.float32)
        logits = np.empty((0, len(manifest.classes)), np.float32)
        return calibrate(self.model, logits, rul, np.empty(0, np.bool_), self.temperature)

    def _compute_losses(self, answers: Predictions, label: Integers) -> Floats:
        labelled = label >= 0
        loss = np.full(len(label), np.nan)
        losses = numerics.cross_entropy(answers.logits[labelled], label[labelled], self.temperature, reduction="none")
        loss[labelled] = np.minimum(losses, FLOAT32_MAX)
        return loss


def _slice_starts(starts: Integers, size: int) -> range:
    return range(0, len(starts), size)


def _group_starts(starts: Integers) -> list[Integers]:
    """Group sorted starts by call, with bounded numbers of windows and rows, which bounds the RAM of a call."""
    blocks = np.split(starts, np.flatnonzero(np.diff(starts // MAX_CALL_ROWS)) + 1)
    return [block[i : i + MAX_OVERLAP_WINDOWS] for block in blocks for i in _slice_starts(block, MAX_OVERLAP_WINDOWS)]


def output_table(scored: Scored, model: Model, engine_column: str, cycle_column: str, integer_ids: bool) -> Any:
    """Return the output rows of a unit as a pyarrow table. Engine and cycle columns have the names of the input."""
    import pyarrow as pa

    answers, unit, classes = scored.answers, scored.unit, model.manifest.classes
    engine_ids = unit.engine_ids.take(pa.array(scored.finite_rows))
    columns: dict[str, Any] = {
        engine_column: engine_ids.cast(pa.int64()) if integer_ids else engine_ids,
        cycle_column: unit.cycle[scored.finite_rows],
        "health": pa.array(classes, pa.string()).take(pa.array(answers.logits.argmax(axis=1))),
    }
    columns |= {f"p_{name}": np.ascontiguousarray(answers.probabilities[:, k]) for k, name in enumerate(classes)}
    if answers.rul is not None:
        columns["rul"] = answers.rul
    if answers.sets is not None:
        columns["prediction_set"] = prediction_set_column(answers.sets, classes)
    columns["expected_loss"] = answers.expected_loss
    if scored.loss is not None:
        columns["loss"] = pa.array(scored.loss, from_pandas=True)  # NaN, which means no label, becomes null
    return pa.table(columns)


def prediction_set_column(mask: npt.NDArray[np.bool_], classes: tuple[str, ...]) -> Any:
    """Return prediction sets (N, C) as a column of lists of class names."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    members = pa.array(classes, pa.string()).take(pa.array(np.nonzero(mask)[1]))
    return pa.ListArray.from_arrays(pa.array(ends), members)
