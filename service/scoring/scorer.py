"""The score function: a unit of rows to columns of answers, by the arithmetic of the service. Knows no files.

Each batch runs on one thread, and several run at once: so the same rows give the same bits on any number of cores.
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
from service.inference.model_loader import Batch, Model
from service.inference.overlap_graph import LARGE, TOGETHER, Histories
from service.inference.predictions import Answers, answer, answers_of, calibrated, joined, picked
from service.inference.predictor import FLOAT32
from service.scoring.rows import Reject
from service.scoring.window_assembly import Integers, Unit

BATCH = 64  # windows of one inference, as in the service: no other size is faster for the bundled model
ROWS_EACH = 16  # rows laid out for a window, beyond which running each window by itself is quicker
NO_ANSWER = "the model has no finite answer for these readings"


@dataclass
class Scored:
    """A unit with its answers; rows without a finite one are left out, and named."""

    unit: Unit
    answers: Answers
    loss: Floats | None  # (N,) NaN without a label; None if no labels were asked for
    kept: Integers  # which rows of the unit the answers are of
    unanswered: list[Reject]


class Scorer:
    """A model at one temperature, and its graph over histories if it has one: same bits with and without."""

    def __init__(self, model: Model, temperature: float, histories: Histories | None = None) -> None:
        self.model, self.temperature, self.histories = model, temperature, histories

    def batches(self, unit: Unit) -> "list[Callable[[], Answers]]":
        """Calls that answer a unit between them, each on a thread of its choice; `together` takes what they give."""
        if self._shares(unit):
            return [partial(self._overlapping, unit.flat, starts) for starts in _near(np.sort(unit.starts))]
        windows = overlapping(unit.flat, self.model.manifest.window or 1)
        return [partial(self._alone, windows, unit.starts[i : i + BATCH]) for i in _cuts(unit.starts, BATCH)]

    def together(self, unit: Unit, parts: list[Answers]) -> Answers:
        """The answers of a unit, in the order of its rows."""
        found = joined(parts or [self._nothing()])
        if not self._shares(unit):
            return found
        order = np.argsort(unit.starts, kind="stable")
        if (order[1:] > order[:-1]).all():
            return found
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return picked(found, place)

    def _shares(self, unit: Unit) -> bool:
        return self.histories is not None and len(unit.flat) <= ROWS_EACH * len(unit.starts)

    def _alone(self, windows: Batch, starts: Integers) -> Answers:
        """Lay out some windows and answer them."""
        shape = (len(starts), *self.model.input_shape)
        return answer(self.model, np.ascontiguousarray(windows[starts]).reshape(shape), self.temperature)

    def _overlapping(self, flat: Batch, starts: Integers) -> Answers:
        """Answer windows that begin one behind another in the rows of a unit."""
        assert self.histories is not None  # asked before
        begin, end = starts[0], starts[-1] + self.histories.window
        outputs = self.histories.answers(flat[begin:end], starts - begin, BATCH)
        return answers_of(self.model, outputs, self.temperature)

    def end(self, unit: Unit, found: Answers, files: list[str], labelled: bool) -> Scored:
        """A unit with its answers, and the losses of labelled rows."""
        kept = np.flatnonzero(found.finite)
        lacking = np.flatnonzero(~found.finite).tolist()
        unanswered = [Reject(int(unit.row[i]), files[unit.file[i]], NO_ANSWER) for i in lacking]
        if lacking:
            found = picked(found, kept)
        loss = self._losses(found, unit.label[kept]) if labelled else None
        return Scored(unit, found, loss, kept, unanswered)

    def _nothing(self) -> Answers:
        manifest = self.model.manifest
        rul = None if manifest.rul_thresholds is None else np.empty(0, np.float32)
        logits = np.empty((0, len(manifest.classes)), np.float32)
        return calibrated(self.model, logits, rul, np.empty(0, np.bool_), self.temperature)

    def _losses(self, found: Answers, label: Integers) -> Floats:
        known = label >= 0
        loss = np.full(len(label), np.nan)
        each = numerics.cross_entropy(found.logits[known], label[known], self.temperature, reduction="none")
        loss[known] = np.minimum(each, FLOAT32)
        return loss


def _cuts(starts: Integers, size: int) -> range:
    return range(0, len(starts), size)


def _near(starts: Integers) -> list[Integers]:
    """Sorted starts in calls: of so many windows at most, and within so many rows, which bounds what a call takes."""
    blocks = np.split(starts, np.flatnonzero(np.diff(starts // LARGE)) + 1)
    return [block[i : i + TOGETHER] for block in blocks for i in _cuts(block, TOGETHER)]


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
