"""Calibration reports, fits of the temperature, and changes of the active temperature.

The use cases above the store and the statistics. Independent of HTTP.
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
    """Return the length of a window like `30d`.

    Raises:
        InvalidInput: the text is not a window.
    """
    match = _WINDOW.fullmatch(window)
    if not match:
        message = f"expected a time like 12h, 30d or 8w, got {window[:40]!r}"
        raise InvalidInput(f"window: {message}", (Fault(("window",), message),))
    return int(match[1]) * _SECONDS[match[2]]


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
        store: source of the predictions and their labels.
        predictor: its model is reported.
        window: as in `seconds_of`; None for all time.
        periods: equal parts of the time, for each of which the loss is included; 0 for none.

    Raises:
        InvalidInput: the window is malformed.
        StoreUnavailable: the database does not respond.
    """
    now = time.time()
    counted = await _counted(store, predictor.model, window, now)
    return await asyncio.to_thread(report_of, counted, CalibrationContext.of(predictor), now, window, periods)


async def fit(store: Store, predictor: Predictor, window: str | None) -> dict[str, Any]:
    """Fit a temperature to joined labels, score it on held-out engines, and store the fit. Apply nothing.

    Raises:
        Conflict: these labels give no better temperature; the detail has the reason.
        InvalidInput: the window is malformed.
        StoreUnavailable: the database does not respond.
    """
    now, model = time.time(), predictor.model
    counted = await _counted(store, model, window, now)
    labelled = ~np.isnan(counted.label[:, 0])
    rows = (counted.logits[labelled], counted.label[labelled], counted.engine[labelled], counted.temperature[labelled])
    try:
        fitted = await asyncio.to_thread(cross_validate_temperature, *rows)
    except FitRefused as refused:
        raise Conflict(str(refused)) from None
    fit_id = prediction_ids(1, now)[0]
    result = {
        "fit_id": fit_id,
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
    stored = StoredFit(fit_id, model.digest, model.manifest, now, fitted.temperature, result)
    await store.save_fit(stored)
    return result


async def apply_temperature(
    store: Store, predictor: Predictor, fit_id: str | None, temperature: float | None, actor: str
) -> ActiveTemperature:
    """Activate the temperature of a fit, or a given one, or with neither restore the previous one.

    Raises:
        NotFound: no such fit.
        Conflict: a fit of another model, or nothing to restore.
        StoreUnavailable: the database does not respond.
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
    counted: CountedPredictions, context: CalibrationContext, now: float, window: str | None, periods: int = 0
) -> dict[str, Any]:
    """Return the report on predictions and their labels, of the store or of a scored file. `now` is the time."""
    manifest, rows = context.model.manifest, _rows(counted, context.model)
    level = manifest.conformal.level if manifest.conformal else None
    body = statistics.calibration(rows, manifest.classes, now, level, window)
    if periods:
        body["over_time"] = statistics.over_time(rows, periods)
    model_fields = {"model": context.model.digest, "temperature": context.temperature}
    return body | model_fields | {"temperature_source": context.source, "drift": _drift(counted, context)}


def _rows(counted: CountedPredictions, model: Model) -> statistics.CalibrationRows:
    covered = sizes = np.full(len(counted.created_at), np.nan)
    rule = model.manifest.conformal
    if rule is not None and len(counted.created_at):
        sets = conformal.prediction_sets(counted.logits, model.manifest.temperature, rule.threshold, rule.method)
        covered, sizes = (counted.label * sets).sum(axis=1), sets.sum(axis=1).astype(np.float64)
    columns = (counted.logits, counted.temperature, counted.label, counted.engine, covered, sizes)
    return statistics.CalibrationRows(*columns, counted.created_at, counted.labelled, counted.source)


def _drift(counted: CountedPredictions, context: CalibrationContext) -> dict[str, Any] | None:
    """Compare confidence, entropy and newest readings of the window with the manifest's reference; None without one."""
    reference = context.model.manifest.reference
    if reference is None:
        return None
    # confidence and entropy are at the temperature of the artefact, as the reference is
    scaled = counted.logits / context.model.manifest.temperature
    top = numerics.softmax(scaled).max(axis=1) if len(scaled) else np.empty(0)
    entropies = numerics.entropy(scaled) if len(scaled) else np.empty(0)
    confidence: npt.ArrayLike = drift.count_bins(top, reference.confidence) if reference.confidence else []
    entropy: npt.ArrayLike = drift.count_bins(entropies, reference.entropy_nats) if reference.entropy_nats else []
    bins = np.frombuffer(counted.feature_bins, dtype=np.uint8).reshape(-1, max(1, len(context.channels)))
    channels = {
        name: np.bincount(bins[:, k], minlength=len(reference.channels[name].shares))
        for k, name in enumerate(context.channels)
    }
    return statistics.drift(reference, confidence, entropy, channels)
