"""`engine-health predict FILE`: predict the newest health of each engine of a file, without a running service.

Predictions have the same bits as those of `/v1/predict` at the same temperature: windows and arithmetic are the same.
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


class NewestCycle(NamedTuple):
    """An engine and its newest cycle."""

    engine_id: str
    cycle: int


def predict_file(name: str, settings: Settings, temperature: float | None, missing: str, as_json: bool) -> int:
    """Print the engines of a file as a table, or as one JSON object per line. `-` is standard input.

    Raises:
        ArtefactRejected: the model cannot be used.
        InvalidInput: the file cannot be read, or a row is invalid. The message names its line.
    """
    model = open_model(settings.model, settings.model_digest, settings.threads, deterministic=settings.deterministic)
    temperature = model.manifest.temperature if temperature is None else temperature
    engines, predictions = predict_newest(name, model, temperature, missing == "hold", settings.max_batch_rows)
    format_lines = format_json_lines if as_json else format_table
    for line in format_lines(model, engines, predictions, temperature):
        print(line)
    sys.stdout.flush()
    return 0


def predict_newest(
    name: str, model: Model, temperature: float, hold: bool, batch_rows: int
) -> tuple[list[NewestCycle], Predictions]:
    """Return the engines of a file, in its order, and the prediction for the newest window of each."""
    if model.manifest.window is None:
        raise InvalidInput(
            f"{model.manifest.name} the model takes no windows of readings, so it cannot predict from a table"
        )
    try:
        engines = telemetry.read_histories(name, model.channels, hold)
    except DataError as error:
        raise InvalidInput(str(error)) from None
    inputs = np.stack([_newest_window(engine, model.channels, model.manifest.window, hold) for engine in engines])
    batches = [inputs[i : i + batch_rows] for i in range(0, len(inputs), batch_rows)]
    predictions = concatenate_predictions([predict_windows(model, batch, temperature) for batch in batches])
    newest = [NewestCycle(engine.engine_id, int(engine.cycle[-1])) for engine in engines]
    if not predictions.finite.all():
        engine_id = newest[int(predictions.finite.argmin())].engine_id
        raise InvalidInput(f"{name}: engine {engine_id!r}: the prediction for its readings is not finite")
    return newest, predictions


def _newest_window(engine: History, channels: tuple[str, ...], window: int, hold: bool) -> Batch:
    if not hold:
        return windows.pad_left(engine.telemetry, window)
    faults: list[Fault] = []
    held, _ = hold_window(engine.telemetry, window, channels, (), faults)
    if held is None:
        row, channel = faults[0].loc
        place = f"engine {engine.engine_id!r}, cycle {engine.cycle[int(row)]}: {channel}"
        raise InvalidInput(f"{place}: {faults[0].msg}")
    return held


def format_json_lines(
    model: Model, engines: Sequence[NewestCycle], predictions: Predictions, temperature: float
) -> Iterator[str]:
    """Yield one object per engine, in the order of the file, with the fields of a prediction of `/v1/predict`."""
    no_ids = [None] * len(engines)
    for row in prediction_rows(model, engines, PredictionResult(temperature, as_slices(predictions)), no_ids):
        yield row.decode()


def format_table(
    model: Model, engines: Sequence[NewestCycle], predictions: Predictions, temperature: float
) -> Iterator[str]:
    """Yield one line per engine, by falling probability of the last class."""
    classes = model.manifest.classes
    lines = [["engine", "cycle", "health", *(f"P({name})" for name in classes)]]
    lines[0] += ["RUL"] * (predictions.rul is not None) + ["prediction set"] * (predictions.sets is not None)
    for i in np.argsort(-predictions.probabilities[:, -1], kind="stable"):
        line = [engines[i].engine_id, str(engines[i].cycle), classes[int(predictions.logits[i].argmax())]]
        line += [f"{value:.3f}" for value in predictions.probabilities[i]]
        line += [] if predictions.rul is None else [f"{predictions.rul[i]:.0f}"]
        line += [] if predictions.sets is None else [", ".join(np.array(classes)[predictions.sets[i]])]
        lines.append(line)
    yield from _align_columns(lines, right={1, *range(3, 3 + len(classes) + (predictions.rul is not None))})
    yield ""
    yield f"{model.manifest.name} {model.manifest.version}, {model.digest[:12]}, temperature {temperature:.3f}"


def _align_columns(lines: list[list[str]], right: set[int]) -> Iterator[str]:
    """Yield lines with columns as wide as their widest cell. Columns with an index in `right` are right-aligned."""
    widths = [max(map(_text_width, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        gaps = [" " * (width - _text_width(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = [gap + cell if k in right else cell + gap for k, (cell, gap) in enumerate(zip(line, gaps, strict=True))]
        yield "  ".join(cells).rstrip()


def _text_width(text: str) -> int:
    """Return the terminal cells of a text: 2 for a Chinese or Japanese letter, 0 for a combining accent."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)
