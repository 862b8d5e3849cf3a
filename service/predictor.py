"""The use case: telemetry, and labels if known, to calibrated health, and its loss. Knows no HTTP and no JSON.

A predictor is one model at one temperature, and never changes: a reload or another temperature is another predictor, so
that whoever holds one is answered by one model.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from model import conformal, numerics
from model.numerics import Floats
from model.occlusion import Shift, Usual, occluded, shifts
from service.batcher import Batcher, Piece, Rows
from service.errors import Fault, InvalidInput, Overloaded
from service.metrics import Labelled, Metrics, observe, observe_all
from service.runtime import Batch, Model, Outputs
from service.settings import Settings
from service.sizes import Sizes
from service.turns import Turns

Mask = npt.NDArray[np.bool_]
Made = TypeVar("Made")
FLOAT32 = float(np.finfo(np.float32).max)  # answers leave as such; a loss of logits near it is more than it
MOST_BINS = 255  # a byte each
MANY_NUMBERS = 2**14  # probabilities of one call; beyond it the event loop is left free while they are worked on


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
    `labelled` is what the labelled rows cost at the service's own temperature, for `Predictor.count_labels`.
    """

    temperature: float
    pieces: Pieces
    loss: Floats | None = None
    evaluation: Evaluation | None = None
    moved: list[list[Shift]] | None = None
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
        sets = conformal.sets_of(own, rule.threshold, rule.method)
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


class Predictor:
    """One model at one temperature, its queue, and the metrics that it feeds."""

    def __init__(
        self, model: Model, metrics: Metrics, settings: Settings, tempered: tuple[float, str] | None = None
    ) -> None:
        self.model = model
        self.temperature, self.temperature_source = tempered or (model.manifest.temperature, "artefact")
        self._metrics = metrics
        manifest = model.manifest
        a_value_each = model.input_shape[-1:] == (len(manifest.channels),) and len(model.input_shape) <= 2
        reference = manifest.reference.channels if manifest.reference and a_value_each else {}
        self._binned = [k for k, name in enumerate(manifest.channel_names) if name in reference]
        self._bins = {manifest.channel_names[k]: reference[manifest.channel_names[k]].edges for k in self._binned}
        self._lone = list(zip(self._binned, self._bins.values(), strict=True))
        self._edges = np.full((len(self._bins), max(map(len, self._bins.values()), default=0)), np.nan)
        for row, edges in zip(self._edges, self._bins.values(), strict=True):
            row[: len(edges)] = edges
        conditions = manifest.conditions
        self._usual = Usual.of(conditions.setting_scales, conditions.usual) if conditions else None
        self._cap = settings.max_batch_rows
        self._batcher = Batcher(
            self._run, self, settings.max_batch_rows, settings.max_queue_rows, settings.max_queue_seconds
        )
        self._turns = Turns(settings.max_queue_seconds)
        self._sizes = Sizes()

    def serve(self) -> None:
        """Say in the metrics that this one answers from now on."""
        manifest = self.model.manifest
        bins = {name: len(edges) + 1 for name, edges in self._bins.items()}
        digest = self.model.digest
        of = (manifest.name, manifest.version, digest, manifest.classes, self.temperature, bins)
        self._series = self._metrics.serving(*of)

    async def close(self) -> None:
        """Answer everybody who was let in, and end."""
        await self._batcher.close()

    def check_room(self, size: int) -> None:
        """Let a request of so many bytes in, or not, before it is read: its rows are guessed from those of others.

        Raises:
            Overloaded: rows like these would have no room, or wait too long.
        """
        self._turns.check(size)
        try:
            self._batcher.check_room(self._sizes.rows(size), self._turns.besides())
        except Overloaded:
            self._turns.refused()
            raise

    @property
    def crowded(self) -> bool:
        """Whether there is more to do than can be done: the last turn of the event loop refused callers."""
        return self._turns.crowded

    async def predict(
        self,
        telemetry: Batch,
        targets: Floats | None = None,
        temperature: float | None = None,
        imputed: npt.NDArray[np.int64] | None = None,
        gone: Callable[[], bool] = lambda: False,
        size: int = 0,
        explain: bool = False,
    ) -> Prediction:
        """Calibrated health of N instances. Their labels are scored; `count_labels` is the caller's to call.

        Args:
            telemetry: (N, *input_shape) float32, finite, windows already padded.
            targets: (N, C) distributions over the classes, a row of NaN where no label is known.
            temperature: in place of the active one, for this call only.
            imputed: (channels,) how many missing values were held, for the metrics.
            gone: whether the caller has left; such rows do not reach the model.
            size: bytes of the request, if it said so.
            explain: also say what each channel did, which costs a row of inference a channel for each instance; only
                for a model that says what is usual (`conditions`).

        Raises:
            InvalidInput: an instance for which the network's answer is not finite.
            Overloaded: too many rows wait, or these waited too long.
            ClientGone: the caller left before its rows were taken.
        """
        if size:
            self._sizes.saw(size, len(telemetry))
        n, rows = len(telemetry), await self._with_occluded(telemetry) if explain else telemetry
        pieces: Pieces = await self._batcher.submit(rows, gone, self._turns.besides(), n)
        if not all(piece.found.finite for piece in pieces):
            _check_finite(pieces, n)
        if imputed is not None:
            self._metrics.imputed(self.model.manifest.channel_names, imputed)
        t = self.temperature if temperature is None else temperature
        if not explain and targets is None and t == self.temperature:
            return Prediction(t, pieces)
        found = together(pieces)
        answers = rows_of(found, 0, n)
        many = answers.logits.size > MANY_NUMBERS
        prediction = (
            await asyncio.to_thread(self._scored, answers, targets, t) if many else self._scored(answers, targets, t)
        )
        return await asyncio.to_thread(_explained, found, prediction) if explain else prediction

    def count_labels(self, found: Prediction, targets: Floats | None, elsewhere: Mask | None = None) -> None:
        """Count in the metrics what the labelled rows of a prediction cost.

        A what-if temperature is answered and not counted: the counters describe what the service says by itself.

        Args:
            found: what `predict` answered.
            targets: as it was told.
            elsewhere: (N,) rows whose truth is counted where it joins a remembered prediction, or not at all.
        """
        labelled = found.labelled
        if labelled is not None and targets is not None and elsewhere is not None and elsewhere.any():
            targets = np.where(elsewhere[:, None], np.nan, targets)
            labelled = None if np.isnan(targets[:, 0]).all() else _labelled(found.answers, targets, self.temperature)
        if labelled is not None:
            self._metrics.labelled_answers(labelled)
            self._metrics.labellable.inc(len(labelled.loss))

    def _scored(self, answers: Answers, targets: Floats | None, t: float) -> Prediction:
        """What the caller is told, and what the counters are."""
        labelled = None if targets is None else _labelled(answers, targets, self.temperature)
        if t != self.temperature:
            answers = calibrated(self.model, answers.logits, answers.rul, answers.finite, t)
            answered = None if targets is None else _labelled(answers, targets, t)
        else:
            answered = labelled
        if targets is None or answered is None:
            return Prediction(t, whole(answers))
        loss = np.full(len(targets), np.nan)
        loss[~np.isnan(targets[:, 0])] = np.minimum(answered.loss, FLOAT32)
        return Prediction(t, whole(answers), loss, _means(answered), labelled=labelled)

    def answer(self, telemetry: Batch) -> Answers:
        """As `predict`, at once and in this thread, for who keeps a queue of its own; `count` is the caller's to call.

        Raises:
            InvalidInput: an instance for which the network's answer is not finite.
        """
        cut = range(0, len(telemetry), self._cap)
        answers = joined([answer(self.model, telemetry[i : i + self._cap], self.temperature) for i in cut])
        if not answers.finite.all():
            raise _unanswerable(int(np.flatnonzero(~answers.finite)[0]))
        return answers

    def count(self, telemetry: Batch, answers: Answers, seconds: float) -> None:
        """Count in the metrics what `answer` answered, and how long it took."""
        self.batch(len(telemetry), seconds)
        self.answered([(telemetry, whole(answers))])

    async def _with_occluded(self, telemetry: Batch) -> Batch:
        """The instances, and behind them each of them once a channel, without it."""
        usual = self._usual
        assert usual is not None  # a model that does not say what is usual is refused at the door
        self._batcher.check_room(len(telemetry) * (1 + telemetry.shape[-1]), self._turns.besides())
        return await asyncio.to_thread(
            lambda: np.concatenate([telemetry, *(occluded(window, usual) for window in telemetry)])
        )

    def _run(self, rows: Rows) -> Inference:
        if not rows.flags.aligned:  # a tensor behind a header of any length
            rows = rows.copy()
        return Inference(answer(self.model, rows, self.temperature))

    def batch(self, rows: int, seconds: float) -> None:
        """As `batcher.Observer`."""
        self._metrics.batch(rows, seconds)

    def waited(self, seconds: list[float]) -> None:
        """As `batcher.Observer`."""
        if len(seconds) == 1:
            observe(self._metrics.queue_duration, seconds[0])
        else:
            observe_all(self._metrics.queue_duration, np.array(seconds))

    def answered(self, answered: Sequence[tuple[Rows, Pieces]]) -> None:
        """Count what was answered. Only the newest row of a window is news: the others were counted before."""
        pieces = [piece for _, some in answered for piece in some]
        answers = together(pieces)
        windows = [rows if rows.ndim == 2 else rows[:, -1] for rows, _ in answered]
        newest = windows[0] if len(windows) == 1 else np.concatenate(windows)
        if not all(piece.found.finite for piece in pieces):
            newest, answers = newest[answers.finite], _those(answers, answers.finite)
        top = answers.logits.argmax(axis=1)
        self._metrics.answers(self._series, top, answers.probabilities.max(axis=1), answers.expected_loss)
        if len(newest) == 1:  # a lone caller's are found, and counted, sooner one by one
            self._metrics.input(self._series, self._bins_of_one(newest))
        elif self._binned:
            self._metrics.inputs(self._series, self._bins_of(newest))

    @property
    def bins(self) -> Callable[[Batch], npt.NDArray[np.integer]] | None:
        """The reference bin of each channel that has a reference, for newest readings (N, channels); None without."""
        return self._bins_of if self._binned and self._edges.shape[1] < MOST_BINS else None

    @property
    def binned(self) -> tuple[str, ...]:
        """The channels that `bins` tells of, in order."""
        return tuple(self._bins)

    def _bins_of(self, newest: Batch) -> npt.NDArray[np.integer]:
        if len(newest) == 1:
            return np.array([self._bins_of_one(newest)], np.uint8)
        readings = newest[:, self._binned].astype(np.float64)
        kind = np.uint8 if self._edges.shape[1] < MOST_BINS else np.int64
        return np.asarray((self._edges < readings[:, :, None]).sum(axis=2, dtype=kind))  # no edge of NaN is below

    def _bins_of_one(self, newest: Batch) -> list[int]:
        if not self._binned:
            return []
        values = newest[0].tolist()
        return [bisect_left(edges, values[k]) for k, edges in self._lone]


def measured(logits: npt.ArrayLike, truths: Floats, t: float, sets: Mask | None) -> Labelled:
    """What N labelled predictions cost: logits and truths (N, C) at one temperature, and their prediction sets."""
    return Labelled(
        loss=numerics.cross_entropy(logits, truths, t, reduction="none"),
        expected_loss=numerics.entropy(logits, t),
        variance=numerics.loss_variance(logits, t),
        correct=numerics.correct(logits, truths),
        brier=numerics.brier(logits, truths, t),
        covered=None if sets is None else (truths * sets).sum(axis=1),
        bins=numerics.reliability(logits, truths, t),
    )


def _labelled(answers: Answers, targets: Floats, t: float) -> Labelled:
    known = ~np.isnan(targets[:, 0])
    return measured(answers.logits[known], targets[known], t, None if answers.sets is None else answers.sets[known])


def _means(labelled: Labelled) -> Evaluation:
    return Evaluation(
        len(labelled.loss),
        min(float(labelled.loss.mean()), FLOAT32),
        float(labelled.expected_loss.mean()),
        float(labelled.correct.mean()),
        float(labelled.brier.mean()),
    )


def _explained(found: Answers, prediction: Prediction) -> Prediction:
    """The prediction with what each channel did: `found` has its N rows, then those of every channel left out."""
    answers, n = prediction.answers, len(prediction.answers.logits)
    channels, moved = (len(found.logits) - n) // n, []
    for i in range(n):
        part = slice(n + i * channels, n + (i + 1) * channels)
        without = numerics.softmax(found.logits[part], prediction.temperature)
        rul = None if answers.rul is None else float(answers.rul[i])
        moved.append(shifts(answers.probabilities[i], rul, without, None if found.rul is None else found.rul[part]))
    return replace(prediction, moved=moved)


def _those(answers: Answers, rows: Mask) -> Answers:
    return Answers(*(None if column is None else column[rows] for column in answers))  # type: ignore[arg-type]  # column by column


def _check_finite(pieces: Pieces, n: int) -> None:
    """Refuse the first of N instances that has no answer; behind them, each has as many rows as there are channels."""
    finite = np.concatenate([piece.found.answers.finite[piece.begin : piece.end] for piece in pieces])
    for bad in np.flatnonzero(~finite)[:1].tolist():  # none, if it is another caller's
        raise _unanswerable(bad if bad < n else (bad - n) * n // (len(finite) - n))


def _unanswerable(i: int) -> InvalidInput:
    """A network may overflow on readings that no engine has; such an instance has no answer, and says so."""
    message = "the model has no finite answer for these readings"
    return InvalidInput(f"instances[{i}].telemetry: {message}", (Fault(("instances", i, "telemetry"), message),))
