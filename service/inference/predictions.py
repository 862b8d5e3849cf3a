"""Calibrated predictions of N rows at one temperature: cutting, joining, scoring. Independent of HTTP and JSON."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation import conformal
from model.evaluation.occlusion import ChannelAttribution
from model.numerics import Floats
from service.inference.batcher import Piece
from service.inference.model_loader import Batch, Model, Outputs
from service.metrics import Labelled

Mask = npt.NDArray[np.bool_]
Made = TypeVar("Made")


class Answers(NamedTuple):
    """What the model says of N rows, at one temperature."""

    logits: Batch  # (N, C)
    rul: Batch | None  # (N,) cycles
    probabilities: Floats  # (N, C)
    expected_loss: Floats  # (N,) nats
    sets: Mask | None  # (N, C): which classes the prediction set holds
    finite: Mask  # (N,): whether there is an answer at all; where not, the other columns mean nothing


class Inference:
    """The answers of one inference, and what is made of them: once for all callers whose rows they are."""

    __slots__ = ("_made", "answers", "finite")

    def __init__(self, answers: Answers) -> None:
        self.answers, self.finite = answers, bool(answers.finite.all())
        self._made: dict[Any, Any] = {}

    def once(self, make: Callable[[Answers], Made]) -> Made:
        """What `make` makes of the answers; callers in several threads may make it twice, and the same."""
        if make not in self._made:
            self._made[make] = make(self.answers)
        return self._made[make]  # type: ignore[no-any-return]  # as it was put there


Pieces = Sequence[Piece[Inference]]


@dataclass(frozen=True)
class Evaluation:
    """Losses of the labelled rows, in nats, and their means."""

    count: int
    cross_entropy: float
    expected_cross_entropy: float
    accuracy: float
    brier: float


@dataclass(frozen=True)
class Prediction:
    """Answers for N rows, in pieces. `loss` (N,) is NaN where no label was given, None where there is none at all.

    `moved` says of each row what each channel did to the answer, the strongest first; None if that was not asked.
    `labelled` is what the labelled rows cost at the service's own temperature, for `LabelAccounting.count_submitted`.
    """

    temperature: float
    pieces: Pieces
    loss: Floats | None = None
    evaluation: Evaluation | None = None
    moved: list[list[ChannelAttribution]] | None = None
    labelled: Labelled | None = None

    @cached_property
    def answers(self) -> Answers:
        """All of them together."""
        return together(self.pieces)


def answer(model: Model, telemetry: Batch, temperature: float) -> Answers:
    """Run the network and calibrate: (N, *input_shape) float32, finite, to answers."""
    return answers_of(model, model.run(telemetry), temperature)


def answers_of(model: Model, outputs: Outputs, temperature: float) -> Answers:
    """What the network said, calibrated; rows of which it said nothing finite are marked."""
    logits, rul = outputs
    finite = np.ones(len(logits), np.bool_)
    if not (np.isfinite(logits).all() and (rul is None or np.isfinite(rul).all())):
        finite = np.isfinite(logits).all(axis=1) & (finite if rul is None else np.isfinite(rul))
        logits = np.where(finite[:, None], logits, np.float32(0))
    return calibrated(model, logits, rul, finite, temperature)


def calibrated(model: Model, logits: Batch, rul: Batch | None, finite: Mask, temperature: float) -> Answers:
    """Probabilities, their entropy, and prediction sets.

    The sets are those at the artefact's own temperature, whatever was asked for: the threshold was found there, and its
    coverage holds nowhere else. They are never empty: the most probable class always belongs.
    """
    manifest = model.manifest
    p, entropy = numerics.posterior(logits, temperature)
    rule, sets = manifest.conformal, None
    if rule is not None:
        own = p if temperature == manifest.temperature else numerics.softmax(logits, manifest.temperature)
        sets = conformal.sets_from_probabilities(own, rule.threshold, rule.method)
    return Answers(logits, rul, p, entropy, sets, finite)


def rows_of(answers: Answers, begin: int, end: int) -> Answers:
    """Some rows of some answers."""
    if begin == 0 and end == len(answers.logits):
        return answers
    return picked(answers, slice(begin, end))


def picked(answers: Answers, which: slice | npt.NDArray[np.int64]) -> Answers:
    """Some rows of some answers, in this order."""
    return Answers(*(None if column is None else column[which] for column in answers))  # type: ignore[arg-type]  # column by column


def together(pieces: Pieces) -> Answers:
    """The answers that lie in some pieces, in their order."""
    return joined([rows_of(piece.found.answers, piece.begin, piece.end) for piece in pieces])


def whole(answers: Answers) -> Pieces:
    """Some answers as one piece."""
    return [Piece(Inference(answers), 0, len(answers.logits))]


def joined(parts: Sequence[Answers]) -> Answers:
    """Answers of some rows after those of others."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return Answers(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]  # column by column
