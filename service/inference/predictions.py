"""Calibrated predictions of N rows at one temperature: calibrate, select, concatenate. Independent of HTTP and JSON."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from model import numerics
from model.evaluation import conformal
from model.evaluation.occlusion import ChannelAttribution
from model.numerics import Floats
from service.inference.batcher import BatchSlice
from service.inference.onnx_model import Batch, Model, Outputs
from service.metrics import Labelled

Mask = npt.NDArray[np.bool_]


class Predictions(NamedTuple):
    """Calibrated predictions of N rows, at one temperature."""

    logits: Batch  # (N, C)
    rul: Batch | None  # (N,) cycles
    probabilities: Floats  # (N, C)
    expected_loss: Floats  # (N,) nats
    sets: Mask | None  # (N, C): whether the prediction set contains the class
    finite: Mask  # (N,): whether the output is finite; if not, the other columns are meaningless


class BatchPredictions(Struct, gc=False):
    """The predictions of one batch, and values derived from them once for all requests of the batch.

    `derived` holds each value under the function that computed it. Two threads may compute it twice, to equal results.
    A Struct, because its constructor enters no Python frame.
    """

    answers: Predictions
    finite: bool
    derived: dict[Callable[[Predictions], Any], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Predictions) -> "BatchPredictions":
        """Return these predictions as one batch."""
        return cls(answers, bool(answers.finite.all()))


PredictionSlices = Sequence[BatchSlice[BatchPredictions]]


@dataclass(frozen=True)
class Evaluation:
    """Losses of the labelled rows, in nats, and their means."""

    count: int
    cross_entropy: float
    expected_cross_entropy: float
    accuracy: float
    brier: float


@dataclass(frozen=True)
class PredictionResult:
    """Predictions of N rows, in slices. `loss` (N,) is NaN where no label was given, None where there is none at all.

    `explanation` has the effect of each channel on each row, the strongest first; None if it was not requested.
    `labelled` has the losses of the labelled rows at the active temperature, for `LabelAccounting.count_submitted`.
    """

    temperature: float
    pieces: PredictionSlices
    loss: Floats | None = None
    evaluation: Evaluation | None = None
    explanation: list[list[ChannelAttribution]] | None = None
    labelled: Labelled | None = None

    @cached_property
    def answers(self) -> Predictions:
        """The predictions of all slices."""
        return concatenate_slices(self.pieces)


def predict_windows(model: Model, telemetry: Batch, temperature: float) -> Predictions:
    """Run the network on windows (N, *input_shape), float32 and finite, and calibrate its outputs."""
    return calibrate_outputs(model, model.run(telemetry), temperature)


def calibrate_outputs(model: Model, outputs: Outputs, temperature: float) -> Predictions:
    """Calibrate the outputs of the network, and mark rows that are not finite."""
    logits, rul = outputs
    finite = np.ones(len(logits), np.bool_)
    if not (np.isfinite(logits).all() and (rul is None or np.isfinite(rul).all())):
        finite = np.isfinite(logits).all(axis=1) & (finite if rul is None else np.isfinite(rul))
        logits = np.where(finite[:, None], logits, np.float32(0))
    return calibrate(model, logits, rul, finite, temperature)


def calibrate(model: Model, logits: Batch, rul: Batch | None, finite: Mask, temperature: float) -> Predictions:
    """Return probabilities, their entropy, and prediction sets.

    The sets are those at the temperature of the artefact, for any `temperature`: the threshold was fitted there, and
    its coverage holds only there. They are never empty: the most probable class always belongs.
    """
    manifest = model.manifest
    p, entropy = numerics.posterior(logits, temperature)
    rule, sets = manifest.conformal, None
    if rule is not None:
        own = p if temperature == manifest.temperature else numerics.softmax(logits, manifest.temperature)
        sets = conformal.sets_from_probabilities(own, rule.threshold, rule.method)
    return Predictions(logits, rul, p, entropy, sets, finite)


def select_range(answers: Predictions, begin: int, end: int) -> Predictions:
    """Return the rows `begin` <= row < `end`."""
    if begin == 0 and end == len(answers.logits):
        return answers
    return select_rows(answers, slice(begin, end))


def select_rows(answers: Predictions, which: slice | npt.NDArray[np.int64]) -> Predictions:
    """Return some rows, in the given order."""
    return Predictions(*(None if column is None else column[which] for column in answers))  # type: ignore[arg-type]  # column by column


def concatenate_slices(slices: PredictionSlices) -> Predictions:
    """Return the predictions of some slices, in order."""
    if len(slices) == 1:
        output, begin, end = slices[0]
        return select_range(output.answers, begin, end)
    return concatenate_predictions([select_range(piece.output.answers, piece.begin, piece.end) for piece in slices])


def as_slices(answers: Predictions) -> PredictionSlices:
    """Return predictions as one slice."""
    return [BatchSlice(BatchPredictions.of(answers), 0, len(answers.logits))]


def concatenate_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate predictions."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return Predictions(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]  # column by column
