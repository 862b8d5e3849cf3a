"""The shapes of what is remembered: flights, labels, ends, engines and their histories. Knows no HTTP."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import numpy as np

from model import numerics
from model.contract import Manifest
from model.evaluation import conformal
from model.evaluation.occlusion import ConditionBaselines
from model.evaluation.sensor_shift import sensor_shifts
from model.numerics import Floats
from model.windows import Readings
from service.codecs import requests
from service.codecs.faults import MISSING, TOO_LARGE, Loc, wrong_channels, wrong_count
from service.codecs.instances import MOST_FAULTS, label_distribution, refuse
from service.codecs.json_numbers import fits_float32, to_float32
from service.codecs.labels import label_json, told_json
from service.codecs.predictions_json import NONE, envelope, prediction_rows
from service.errors import Conflict, Fault, InvalidInput, MalformedJson
from service.inference.model_loader import Model
from service.inference.predictor import Predictor
from service.store.flight_recording import Flight, RecordedFlights
from service.store.labelling import Source
from service.store.sql.labels import Said
from service.store.sql.queries import History, Page
from service.store.sql.session import Kind

CURSOR_BYTES = 2048  # the longest name, escaped as JSON, in base64, is 1632
Stored = Any  # a row of the table of predictions


def read_flights(body: bytes, model: Model, most: int) -> list[Flight]:
    """A body of `/v1/cycles`, decoded.

    Raises:
        MalformedJson: what its bytes are not.
        InvalidInput: what is wrong with it, by row and channel.
    """
    asked, channels = requests.parse(body, requests.CyclesRequest), model.channels
    if model.manifest.window is None:
        refuse([Fault(("cycles",), "this model takes no windows of readings: there is nothing to collect flights for")])
    _not_too_many("cycles", len(asked.cycles), most)
    faults: list[Fault] = []
    found = []
    for i, flight in enumerate(asked.cycles):
        values = _quick(flight.telemetry, len(channels))
        if values is None:
            values = _reading(flight.telemetry, channels, ("cycles", i, "telemetry"), faults)
        if values is not None:
            found.append(Flight(flight.engine_id, flight.cycle, values))
        if len(faults) >= MOST_FAULTS:
            break
    refuse(faults)
    return found


def _quick(raw: msgspec.Raw, width: int) -> Readings | None:
    """The values if they are surely as many finite numbers as there are channels."""
    try:
        values = msgspec.json.decode(raw, type=list[float])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return to_float32(np.array(values)) if len(values) == width else None


def _reading(raw: msgspec.Raw, channels: tuple[str, ...], loc: Loc, faults: list[Fault]) -> Readings | None:
    """The values of one flight by position or by name; None after naming what is wrong."""
    try:
        values = msgspec.json.decode(raw)
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
        RecursionError,
    ) as error:  # a raw string was not looked into before
        raise MalformedJson(f"{requests.describe(loc)} is not JSON: {error}") from None
    before = len(faults)
    if isinstance(values, dict):
        faults += wrong_channels(values, channels, loc)
        values = [values.get(name) for name in channels]
    if not isinstance(values, list) or len(values) != len(channels):
        got = f"{len(values)} values" if isinstance(values, list) else "something else"
        faults.append(Fault(loc, wrong_count(f"{len(channels)} numbers", got)))
    elif len(faults) == before:
        for name, value in zip(channels, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float):
                faults.append(Fault((*loc, name), MISSING if value is None else "expected a number"))
            elif not fits_float32(value):
                faults.append(Fault((*loc, name), TOO_LARGE))
    return np.array(values, dtype=np.float32) if len(faults) == before else None


def cycles_json(predictor: Predictor, flights: Sequence[Flight], recorded: RecordedFlights) -> bytes:
    """What `/v1/cycles` answers, as JSON.

    Raises:
        Conflict: every flight contradicts what is known of its cycle.
    """
    channels = predictor.model.channels
    told: list[dict[str, Any]] = []
    for flight, outcome in zip(flights, recorded.outcomes, strict=True):
        told.append({"result": outcome.result})
        if outcome.known is not None:
            told[-1] |= {"given": _named(channels, flight.telemetry), "known": _named(channels, outcome.known)}
    if recorded.prediction is None:
        raise Conflict("every flight contradicts what is known of its cycle", results=told)
    accepted = [flight for flight, outcome in zip(flights, recorded.outcomes, strict=True) if outcome.known is None]
    found = iter(prediction_rows(predictor.model, accepted, recorded.prediction, recorded.ids))
    rows = [next(found) if outcome.known is None else NONE for outcome in recorded.outcomes]
    return envelope(predictor, rows, recorded.prediction, False, {"results": told})


def _named(channels: tuple[str, ...], values: Readings) -> dict[str, np.float32]:
    return dict(zip(channels, values, strict=True))


def read_labels(body: bytes, classes: tuple[str, ...], most: int) -> list[Said]:
    """A body of `/v1/labels`, decoded.

    Raises:
        MalformedJson: what its bytes are not.
        InvalidInput: what is wrong with it, by row.
    """
    asked = requests.parse(body, requests.LabelsRequest)
    _not_too_many("labels", len(asked.labels), most)
    faults: list[Fault] = []
    found = []
    for i, row in enumerate(asked.labels):
        by_cycle = row.engine_id is not None and row.cycle is not None
        if (row.prediction_id is None) != by_cycle or (row.prediction_id and (row.engine_id or row.cycle is not None)):
            faults.append(Fault(("labels", i), "name it by prediction_id, or by engine_id and cycle"))
            continue
        try:
            label = label_distribution(row.label, classes)
        except ValueError as error:
            faults.append(Fault(("labels", i, "label"), str(error)))
            continue
        found.append(Said(row.prediction_id, row.engine_id, row.cycle, label, row.revise or asked.revise))
    refuse(faults)
    return found


def labels_json(rows: Sequence[Said], results: Sequence[tuple[str, Floats | None]], classes: tuple[str, ...]) -> Any:
    """What `/v1/labels` answers.

    Raises:
        Conflict: every label contradicts another one that was given before.
    """
    told = [told_json(row.label, *one, classes) for row, one in zip(rows, results, strict=True)]
    if all(result == "conflict" for result, _ in results):
        message = 'every label contradicts one that was given before; "revise": true would replace it'
        raise Conflict(message, results=told)
    return {"results": told}


def engines_json(found: Page) -> dict[str, Any]:
    """What `/v1/engines` answers."""
    rows = answers_json(found.rows, found.kinds)
    for row, stored in zip(rows, found.rows, strict=True):
        row["engine_id"], row["cycle"] = stored.engine_id, stored.cycle
        row["updated_at"], row["failed_at_cycle"] = moment(stored.made), stored.failed_at
    if found.trend is not None:
        trends = _trends(found.trend, found.kinds)
        for row, stored in zip(rows, found.rows, strict=True):
            row["trend"] = trends.get(stored.engine, [])
    last = found.rows[-1] if found.more else None
    return {
        "engines": rows,
        "total": found.total,
        "next": None if last is None else write_cursor(last.risk, last.engine_id),
    }


def _trends(rows: Sequence[Stored], kinds: Mapping[int, Kind]) -> dict[int, list[tuple[int, np.float32]]]:
    """Cycle and probability of the last class, by engine."""
    found: dict[int, list[tuple[int, np.float32]]] = {}
    for group in _by_kind(rows, kinds):
        for i, risk in zip(group.places, group.probabilities()[:, -1], strict=True):
            found.setdefault(rows[i].engine, []).append((rows[i].cycle, risk))
    for trend in found.values():
        trend.sort()  # of several models together
    return found


def history_json(engine_id: str, found: History) -> dict[str, Any]:
    """What `/v1/engines/{id}` answers."""
    answered = answers_json(found.rows, found.kinds)
    for group in _by_kind(found.rows, found.kinds):
        expected = numerics.entropy(group.scaled).astype(np.float32)
        for k, i in enumerate(group.places):
            answered[i] |= {"logits": group.logits[k], "expected_loss": expected[k]}
    past = [_past(row, found.kinds[row.model], one) for row, one in zip(found.rows, answered, strict=True)]
    return {"engine_id": engine_id, "failed_at_cycle": found.failed_at, "history": past}


def sensors_json(manifest: Manifest, cycles: Sequence[int], flights: Readings) -> dict[str, Any] | None:
    """How far each sensor is from what is usual; None of a model that does not say what is."""
    conditions, names = manifest.conditions, manifest.channel_names
    if conditions is None or not conditions.deviations:
        return None
    usual = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
    found = sensor_shifts(flights, usual, conditions.deviations) if len(cycles) else []
    rows = [{"channel": names[one.channel], "moved": one.shift, "away": one.deviations.round(4)} for one in found]
    return {"cycles": cycles, "channels": rows}


def _past(row: Stored, kind: Kind, answered: dict[str, Any]) -> dict[str, Any]:
    truth = None if row.label is None else np.frombuffer(row.label)
    loss = None
    if truth is not None:
        logits = np.frombuffer(row.logits, np.float32)
        loss = np.float32(numerics.cross_entropy(logits, truth[None], row.temperature))
    return {
        "prediction_id": row.id,
        "cycle": row.cycle,
        "made_at": moment(row.made),
        "model": kind.digest,
        "temperature": row.temperature,
        "temperature_source": row.temperature_source,
        "counts": row.counts,
        **answered,
        "label": None if truth is None else label_json(truth, kind.classes),
        "source": None if row.source is None else Source(row.source).name.lower(),
        "labelled_at": None if row.labelled is None else moment(row.labelled),
        "loss": loss,
    }


def answers_json(rows: Sequence[Stored], kinds: Mapping[int, Kind]) -> list[dict[str, Any]]:
    """The health of stored predictions as it was answered."""
    found: list[dict[str, Any]] = [{}] * len(rows)
    for group in _by_kind(rows, kinds):
        classes, p, sets = group.kind.classes, group.probabilities(), group.sets()
        for k, (i, top) in enumerate(zip(group.places, group.logits.argmax(axis=1).tolist(), strict=True)):
            rul = rows[i].rul
            found[i] = {
                "health": classes[top],
                "probabilities": dict(zip(classes, p[k], strict=True)),
                "rul": None if rul is None else np.float32(rul),
                "prediction_set": sets[k] if sets else None,
            }
    return found


class Group(NamedTuple):
    """Rows of one model: their places, and logits (N, C) as the network gave them and over their temperatures."""

    kind: Kind
    places: list[int]
    logits: Readings
    scaled: Floats

    def probabilities(self) -> Readings:
        """(N, C), float32 as they were answered."""
        return numerics.softmax(self.scaled).astype(np.float32)

    def sets(self) -> list[list[str]] | None:
        """The prediction set of each row; None of a model without a rule."""
        rule, classes = self.kind.conformal, self.kind.classes
        if rule is None:
            return None
        inside = conformal.prediction_sets(self.logits, self.kind.temperature, rule.threshold, rule.method).tolist()
        return [[name for name, held in zip(classes, row, strict=True) if held] for row in inside]


def _by_kind(rows: Sequence[Stored], kinds: Mapping[int, Kind]) -> Iterator[Group]:
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.model, []).append(i)
    for model, places in groups.items():
        logits = np.frombuffer(b"".join([rows[i].logits for i in places]), np.float32).reshape(len(places), -1)
        yield Group(kinds[model], places, logits, numerics.scaled_rows(logits, [rows[i].temperature for i in places]))


def moment(seconds: float) -> str:
    """A time as RFC 3339 has it, in UTC."""
    whole, part = divmod(round(seconds * 1e6), 1_000_000)
    return f"{_second(whole)}.{part // 1000:03}Z"


@lru_cache(4096)  # a page of engines has few
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def read_moment(name: str, text: str) -> float:
    """Seconds since 1970 of a time as RFC 3339 has it.

    Raises:
        InvalidInput: it is none; names the parameter.
    """
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            raise ValueError
        return found.timestamp()
    except (ValueError, OverflowError):
        message = f"expected a time like 2026-11-25T12:00:00Z, got {text[:40]!r}"
        raise InvalidInput(f"{name}: {message}", (Fault((name,), message),)) from None


def write_cursor(risk: float, engine_id: str) -> str:
    """Where the next page begins."""
    return base64.urlsafe_b64encode(msgspec.json.encode((risk, engine_id))).decode().rstrip("=")


def read_cursor(text: str) -> tuple[float, str]:
    """As `write_cursor` wrote it.

    Raises:
        InvalidInput: somebody else did.
    """
    try:
        if len(text) > CURSOR_BYTES:
            raise ValueError
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        risk, name = msgspec.json.decode(raw, type=tuple[float, str])
        if not math.isfinite(risk) or "\0" in name:
            raise ValueError
    except (ValueError, msgspec.MsgspecError):
        message = "not a `next` of this service"
        raise InvalidInput(f"next: {message}", (Fault(("next",), message),)) from None
    return risk, name


def _not_too_many(what: str, n: int, most: int) -> None:
    if n > most:
        refuse([Fault((what,), f"{n} rows, at most {most} are taken in one call")])
