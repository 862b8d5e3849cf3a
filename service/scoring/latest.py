"""`engine-health predict FILE`: the newest health of each engine of a file, as the service answers it, without one.

Bit for bit the answer of `/v1/predict` at the artefact's temperature: the same windows, the same arithmetic.
"""

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from model import windows
from model.data import telemetry
from model.data.cmapss import DataError, History
from service.codecs.missing_values import hold_window
from service.codecs.predictions_json import prediction_rows
from service.errors import Fault, InvalidInput
from service.inference.model_loader import open_model
from service.inference.onnx_model import Batch, Model
from service.inference.predictions import (
    PredictionResult,
    Predictions,
    as_slices,
    concatenate_predictions,
    predict_windows,
)
from service.settings import Settings


class Newest(NamedTuple):
    """An engine and its newest cycle."""

    engine_id: str
    cycle: int


def predict(name: str, settings: Settings, temperature: float | None, missing: str, as_json: bool) -> int:
    """Print a table, or a JSON object a line, of the engines of a file; `-` is standard input.

    Raises:
        ArtefactRejected: the model cannot be used.
        InvalidInput: the file cannot be read, or a row is wrong; names its line.
    """
    model = open_model(settings.model, settings.model_digest, settings.threads, deterministic=settings.deterministic)
    t = model.manifest.temperature if temperature is None else temperature
    engines, found = answers_of(name, model, t, missing == "hold", settings.max_batch_rows)
    for line in as_lines(model, engines, found, t) if as_json else table(model, engines, found, t):
        print(line)
    sys.stdout.flush()
    return 0


def answers_of(
    name: str, model: Model, temperature: float, hold: bool = False, batch: int = 64
) -> tuple[list[Newest], Predictions]:
    """The engines of a file, in its order, and what the model says of the newest window of each."""
    if model.manifest.window is None:
        raise InvalidInput(f"{model.manifest.name} takes no windows of readings: there is nothing to read from a table")
    try:
        engines = telemetry.read_histories(name, model.channels, hold)
    except DataError as error:
        raise InvalidInput(str(error)) from None
    seen = np.stack([_window(engine, model.channels, model.manifest.window, hold) for engine in engines])
    found = concatenate_predictions(
        [predict_windows(model, seen[i : i + batch], temperature) for i in range(0, len(seen), batch)]
    )
    newest = [Newest(engine.engine_id, int(engine.cycle[-1])) for engine in engines]
    if not found.finite.all():
        of = newest[int(found.finite.argmin())]
        raise InvalidInput(f"{name}: engine {of.engine_id!r}: the model has no finite answer for its readings")
    return newest, found


def _window(engine: History, channels: tuple[str, ...], window: int, hold: bool) -> Batch:
    if not hold:
        return windows.pad_left(engine.telemetry, window)
    faults: list[Fault] = []
    held, _ = hold_window(engine.telemetry, window, channels, (), faults)
    if held is None:
        row, channel = faults[0].loc
        place = f"engine {engine.engine_id!r}, cycle {engine.cycle[int(row)]}: {channel}"
        raise InvalidInput(f"{place}: {faults[0].msg}")
    return held


def as_lines(model: Model, engines: Sequence[Newest], found: Predictions, temperature: float) -> Iterator[str]:
    """An object for each engine, in the order of the file, shaped as a prediction of `/v1/predict`."""
    nobody = [None] * len(engines)
    for row in prediction_rows(model, engines, PredictionResult(temperature, as_slices(found)), nobody):
        yield row.decode()


def table(model: Model, engines: Sequence[Newest], found: Predictions, temperature: float) -> Iterator[str]:
    """A line for each engine, the worst first: that most likely of the last class."""
    classes = model.manifest.classes
    lines = [["engine", "cycle", "health", *(f"P({name})" for name in classes)]]
    lines[0] += ["RUL"] * (found.rul is not None) + ["prediction set"] * (found.sets is not None)
    for i in np.argsort(-found.probabilities[:, -1], kind="stable"):
        p = found.probabilities[i]
        line = [engines[i].engine_id, str(engines[i].cycle), classes[int(found.logits[i].argmax())]]
        line += [f"{value:.3f}" for value in p]
        line += [] if found.rul is None else [f"{found.rul[i]:.0f}"]
        line += [] if found.sets is None else [", ".join(np.array(classes)[found.sets[i]])]
        lines.append(line)
    yield from _aligned(lines, right={1, *range(3, 3 + len(classes) + (found.rul is not None))})
    yield ""
    yield f"{model.manifest.name} {model.manifest.version}, {model.digest[:12]}, temperature {temperature:.3f}"


def _aligned(lines: list[list[str]], right: set[int]) -> Iterator[str]:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = [gap + cell if k in right else cell + gap for k, (cell, gap) in enumerate(zip(line, gaps, strict=True))]
        yield "  ".join(cells).rstrip()


def _width(text: str) -> int:
    """Places on a terminal: two of a Chinese or Japanese letter, none of an accent that stands on another one."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)
