"""Calibration reports, fits of the temperature, and changes of the active temperature.

The use cases above the store and the statistics. Knows no HTTP.
"""

import asyncio
import re
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation import conformal, drift
from model.evaluation.temperature_fit import FitRefused, MetricChange, cross_validate_temperature
from service.calibration import statistics
from service.errors import Conflict, Fault, InvalidInput
from service.ids import prediction_ids
from service.inference.onnx_model import Model
from service.inference.predictor import Predictor
from service.store.records import ActiveTemperature, CountedPredictions, StoredFit, TemperatureChange
from service.store.store import Store

_WINDOW = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds_of(window: str) -> float:
    """How long a window like `30d` is.

    Raises:
        InvalidInput: it is none.
    """
    found = _WINDOW.fullmatch(window)
    if not found:
        message = f"expected a time like 12h, 30d or 8w, got {window[:40]!r}"
        raise InvalidInput(f"window: {message}", (Fault(("window",), message),))
    return int(found[1]) * _SECONDS[found[2]]


class CalibrationContext(NamedTuple):
    """The model and temperature that a calibration report is about."""

    model: Model
    temperature: float
    source: str  # of the temperature
    channels: tuple[str, ...]  # of the stored reference bins, in their order

    @classmethod
    def of(cls, predictor: Predictor) -> "CalibrationContext":
        """Return the context of the predictor that serves."""
        return cls(predictor.model, predictor.temperature, predictor.temperature_source, predictor.drift_bins.channels)


async def report(store: Store, predictor: Predictor, window: str | None, periods: int = 0) -> dict[str, Any]:
    """Return the response of `GET /v1/calibration`: the active model, at the temperatures of its stored predictions.

    Args:
        store: has the predictions and their labels.
        predictor: has the model.
        window: as in `seconds_of`; None for all time.
        periods: equal parts of the time, for each of which the loss is included; 0 for none.

    Raises:
        InvalidInput: a window that is none.
        StoreUnavailable: the database does not answer.
    """
    now = time.time()
    found = await _counted(store, predictor.model, window, now)
    return await asyncio.to_thread(report_of, found, CalibrationContext.of(predictor), now, window, periods)


async def fit(store: Store, predictor: Predictor, window: str | None) -> dict[str, Any]:
    """Fit a temperature to joined labels, score it on held-out engines, and store the fit. Apply nothing.

    Raises:
        Conflict: these labels give no better temperature; the detail has the reason.
        InvalidInput: a window that is none.
        StoreUnavailable: the database does not answer.
    """
    now, model = time.time(), predictor.model
    found = await _counted(store, model, window, now)
    known = ~np.isnan(found.label[:, 0])
    rows = (found.logits[known], found.label[known], found.engine[known], found.temperature[known])
    try:
        fitted = await asyncio.to_thread(cross_validate_temperature, *rows)
    except FitRefused as refused:
        raise Conflict(str(refused)) from None
    name = prediction_ids(1, now)[0]
    result = {
        "fit_id": name,
        "model": model.digest,
        "window": window,
        "temperature": fitted.temperature,
        "active_temperature": predictor.temperature,
        "n": fitted.rows,
        "engines": fitted.engines,
        "significant": fitted.significant,  # whether all of the held-out interval is a gain
        "held_out": {
            "temperatures": fitted.held_out_temperatures,
            "cross_entropy": _change(fitted.cross_entropy),
            "ece": _change(fitted.ece),
        },
    }
    stored = StoredFit(name, model.digest, model.manifest, now, fitted.temperature, result)
    await store.save_fit(stored)
    return result


async def apply_temperature(
    store: Store, predictor: Predictor, fit_id: str | None, temperature: float | None, actor: str
) -> ActiveTemperature:
    """Activate the temperature of a fit, or a given one, or with neither restore the previous one.

    Raises:
        NotFound: no such fit.
        Conflict: a fit of another model, or nothing to take back.
        StoreUnavailable: the database does not answer.
    """
    model = predictor.model
    change = TemperatureChange(model.digest, model.manifest, fit_id, temperature, actor, time.time())
    return await store.change_temperature(change)


def _change(change: MetricChange) -> dict[str, Any]:
    return {
        "before": change.before,
        "after": change.after,
        "difference": change.difference,
        "interval": change.interval,
    }


async def _counted(store: Store, model: Model, window: str | None, now: float) -> CountedPredictions:
    since = None if window is None else now - seconds_of(window)
    return await store.counted_predictions(model.digest, len(model.manifest.classes), since)


def report_of(
    found: CountedPredictions, context: CalibrationContext, now: float, window: str | None, periods: int = 0
) -> dict[str, Any]:
    """Return the report on some predictions and their labels, of the store or of a scored file. `now` is the clock."""
    manifest, rows = context.model.manifest, _rows(found, context.model)
    level = manifest.conformal.level if manifest.conformal else None
    body = statistics.calibration(rows, manifest.classes, now, level, window)
    if periods:
        body["over_time"] = statistics.over_time(rows, periods)
    about = {"model": context.model.digest, "temperature": context.temperature}
    return body | about | {"temperature_source": context.source, "drift": _drift(found, context)}


def _rows(found: CountedPredictions, model: Model) -> statistics.CalibrationRows:
    covered = sizes = np.full(len(found.created_at), np.nan)
    rule = model.manifest.conformal
    if rule is not None and len(found.created_at):
        sets = conformal.prediction_sets(found.logits, model.manifest.temperature, rule.threshold, rule.method)
        covered, sizes = (found.label * sets).sum(axis=1), sets.sum(axis=1).astype(np.float64)
    columns = (found.logits, found.temperature, found.label, found.engine, covered, sizes)
    return statistics.CalibrationRows(*columns, found.created_at, found.labelled, found.source)


def _drift(found: CountedPredictions, context: CalibrationContext) -> dict[str, Any] | None:
    """Confidence, entropy and newest readings of the window against the manifest's reference; None without one."""
    reference = context.model.manifest.reference
    if reference is None:
        return None
    # both at the artefact's temperature, as the reference is
    own = found.logits / context.model.manifest.temperature
    top = numerics.softmax(own).max(axis=1) if len(own) else np.empty(0)
    expected = numerics.entropy(own) if len(own) else np.empty(0)
    confidence: npt.ArrayLike = drift.count_bins(top, reference.confidence) if reference.confidence else []
    entropy: npt.ArrayLike = drift.count_bins(expected, reference.entropy_nats) if reference.entropy_nats else []
    bins = np.frombuffer(found.feature_bins, dtype=np.uint8).reshape(-1, max(1, len(context.channels)))
    channels = {
        name: np.bincount(bins[:, k], minlength=len(reference.channels[name].shares))
        for k, name in enumerate(context.channels)
    }
    return statistics.drift(reference, confidence, entropy, channels)
