"""The score function: a unit of rows to columns of answers, by the arithmetic of the service. Knows no files.

Each batch runs on one thread, and several run at once: so the same rows give the same bits on any number of cores.
"""

from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model import numerics
from model.numerics import Floats
from service.predictor import FLOAT32, Answers, answer, calibrated, joined
from service.runtime import Batch, Model
from service.score.gather import Unit
from service.score.rows import Reject

BATCH = 64  # windows of one inference, as in the service: no other size is faster for the bundled model
NO_ANSWER = "the model has no finite answer for these readings"


@dataclass
class Scored:
    """A unit with its answers; rows without a finite one are left out, and named."""

    unit: Unit
    answers: Answers
    loss: Floats | None  # (N,) NaN without a label; None if no labels were asked for
    kept: npt.NDArray[np.int64]  # which rows of the unit the answers are of
    unanswered: list[Reject]


class Scorer:
    """A model at one temperature."""

    def __init__(self, model: Model, temperature: float) -> None:
        self.model, self.temperature = model, temperature

    def begin(self, unit: Unit, pool: Executor) -> "list[Future[Answers]]":
        """Set a pool to work on the batches of a unit."""
        windows = views(unit, self.model)
        cuts = range(0, len(unit.starts), BATCH)
        return [pool.submit(self.batch, windows, unit.starts[i : i + BATCH]) for i in cuts]

    def batch(self, windows: Batch, starts: npt.NDArray[np.int64]) -> Answers:
        """Lay out some windows and answer them."""
        shape = (len(starts), *self.model.input_shape)
        return answer(self.model, np.ascontiguousarray(windows[starts]).reshape(shape), self.temperature)

    def end(self, unit: Unit, parts: list[Answers], files: list[str], labelled: bool) -> Scored:
        """The answers of all batches of a unit, in order, with the losses of labelled rows."""
        found = joined(parts or [self._nothing()])
        kept = np.flatnonzero(found.finite)
        lacking = np.flatnonzero(~found.finite).tolist()
        unanswered = [Reject(int(unit.row[i]), files[unit.file[i]], NO_ANSWER) for i in lacking]
        if lacking:
            found = Answers(*(None if column is None else column[kept] for column in found))  # type: ignore[arg-type]  # column by column
        loss = self._losses(found, unit.label[kept]) if labelled else None
        return Scored(unit, found, loss, kept, unanswered)

    def _nothing(self) -> Answers:
        manifest = self.model.manifest
        rul = None if manifest.rul_thresholds is None else np.empty(0, np.float32)
        logits = np.empty((0, len(manifest.classes)), np.float32)
        return calibrated(self.model, logits, rul, np.empty(0, np.bool_), self.temperature)

    def _losses(self, found: Answers, label: npt.NDArray[np.int64]) -> Floats:
        known = label >= 0
        loss = np.full(len(label), np.nan)
        each = numerics.cross_entropy(found.logits[known], label[known], self.temperature, reduction="none")
        loss[known] = np.minimum(each, FLOAT32)
        return loss


def views(unit: Unit, model: Model) -> Batch:
    """Every window of a unit's rows, (M, window, C), without a copy."""
    window = model.manifest.window or 1
    if len(unit.flat) < window:
        return np.empty((0, window, unit.flat.shape[1]), np.float32)
    return np.lib.stride_tricks.sliding_window_view(unit.flat, window, axis=0).transpose(0, 2, 1)


def table(scored: Scored, model: Model, engine: str, cycle: str, whole_numbers: bool) -> Any:
    """A unit's rows of the output (pyarrow), engine and cycle under the names that they have in the input."""
    import pyarrow as pa

    answers, unit, classes = scored.answers, scored.unit, model.manifest.classes
    names = unit.names.take(pa.array(scored.kept))
    columns: dict[str, Any] = {
        engine: names.cast(pa.int64()) if whole_numbers else names,
        cycle: unit.cycle[scored.kept],
        "health": pa.array(classes, pa.string()).take(pa.array(answers.logits.argmax(axis=1))),
    }
    columns |= {f"p_{name}": np.ascontiguousarray(answers.probabilities[:, k]) for k, name in enumerate(classes)}
    if answers.rul is not None:
        columns["rul"] = answers.rul
    if answers.sets is not None:
        columns["prediction_set"] = sets(answers.sets, classes)
    columns["expected_loss"] = answers.expected_loss
    if scored.loss is not None:
        columns["loss"] = pa.array(scored.loss, from_pandas=True)  # NaN is null: there is no label
    return pa.table(columns)


def sets(mask: npt.NDArray[np.bool_], classes: tuple[str, ...]) -> Any:
    """Prediction sets (N, C) as lists of names."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    members = pa.array(classes, pa.string()).take(pa.array(np.nonzero(mask)[1]))
    return pa.ListArray.from_arrays(pa.array(ends), members)
