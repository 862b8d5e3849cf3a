"""Decode requests to the store: flights, labels, times and cursors. Independent of HTTP."""

import base64
import math
from datetime import datetime

import msgspec
import numpy as np

from model.windows import Readings
from service.codecs import parse, requests
from service.codecs.faults import (
    MAX_FAULTS,
    MISSING,
    TOO_LARGE,
    Loc,
    check_row_count,
    describe,
    invalid_input,
    refuse,
    wrong_channels,
    wrong_count,
)
from service.codecs.labels import label_distribution
from service.codecs.number_parser import fits_float32, to_float32
from service.errors import Fault, MalformedJson
from service.inference.onnx_model import Model
from service.store.flight_rounds import NewFlight
from service.store.records import LabelSubmission

MAX_CURSOR_BYTES = 2048  # the longest name, escaped as JSON, in base64, has 1632


def decode_flights(body: bytes, model: Model, max_rows: int) -> list[NewFlight]:
    """Decode a body of `/v1/cycles`.

    Raises:
        MalformedJson: the body is not JSON.
        InvalidInput: wrong values, with row and channel.
    """
    request, channels = parse.parse(body, requests.CyclesRequest), model.channels
    if model.manifest.window is None:
        refuse([Fault(("cycles",), "this model has no windows of readings, so flights cannot be stored for it")])
    check_row_count("cycles", len(request.cycles), max_rows)
    faults: list[Fault] = []
    flights = []
    for i, flight in enumerate(request.cycles):
        values = _parse_numbers(flight.telemetry, len(channels))
        if values is None:
            values = _diagnose_reading(flight.telemetry, channels, ("cycles", i, "telemetry"), faults)
        if values is not None:
            flights.append(NewFlight(flight.engine_id, flight.cycle, values))
        if len(faults) >= MAX_FAULTS:
            break
    refuse(faults)
    return flights


def _parse_numbers(raw: msgspec.Raw, width: int) -> Readings | None:
    """Return `width` numbers that are finite as float32; None if the text is anything else."""
    try:
        values = msgspec.json.decode(raw, type=list[float])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return to_float32(np.array(values)) if len(values) == width else None


def _diagnose_reading(raw: msgspec.Raw, channels: tuple[str, ...], loc: Loc, faults: list[Fault]) -> Readings | None:
    """Return the values of one flight, by position or by name; None after faults are appended to `faults`."""
    try:
        values = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # `Raw` does not decode strings
        raise MalformedJson(f"{describe(loc)} is not JSON: {error}") from None
    earlier_faults = len(faults)
    if isinstance(values, dict):
        faults += wrong_channels(values, channels, loc)
        values = [values.get(name) for name in channels]
    if not isinstance(values, list) or len(values) != len(channels):
        got = f"{len(values)} values" if isinstance(values, list) else "something else"
        faults.append(Fault(loc, wrong_count(f"{len(channels)} numbers", got)))
    elif len(faults) == earlier_faults:
        for name, value in zip(channels, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float):
                faults.append(Fault((*loc, name), MISSING if value is None else "expected a number"))
            elif not fits_float32(value):
                faults.append(Fault((*loc, name), TOO_LARGE))
    return np.array(values, dtype=np.float32) if len(faults) == earlier_faults else None


def decode_label_rows(body: bytes, classes: tuple[str, ...], max_rows: int) -> list[LabelSubmission]:
    """Decode a body of `/v1/labels`.

    Raises:
        MalformedJson: the body is not JSON.
        InvalidInput: wrong values, with their rows.
    """
    request = parse.parse(body, requests.LabelsRequest)
    check_row_count("labels", len(request.labels), max_rows)
    faults: list[Fault] = []
    labels = []
    for i, row in enumerate(request.labels):
        by_cycle = row.engine_id is not None and row.cycle is not None
        if (row.prediction_id is None) != by_cycle or (row.prediction_id and (row.engine_id or row.cycle is not None)):
            faults.append(Fault(("labels", i), "expected prediction_id, or engine_id and cycle"))
            continue
        try:
            label = label_distribution(row.label, classes)
        except ValueError as error:
            faults.append(Fault(("labels", i, "label"), str(error)))
            continue
        revise = row.revise or request.revise
        labels.append(LabelSubmission(row.prediction_id, row.engine_id, row.cycle, label, revise))
    refuse(faults)
    return labels


def parse_time(name: str, text: str) -> float:
    """Return the seconds since 1970 of a time in the format of RFC 3339.

    Raises:
        InvalidInput: the text is not such a time; its place is the parameter `name`.
    """
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError
        return time.timestamp()
    except (ValueError, OverflowError):
        message = f"expected a time like 2026-11-25T12:00:00Z, got {text[:40]!r}"
        raise invalid_input((name,), message) from None


def encode_cursor(risk: float, engine_id: str) -> str:
    """Return the cursor of the page that begins after this engine."""
    return base64.urlsafe_b64encode(msgspec.json.encode((risk, engine_id))).decode().rstrip("=")


def decode_cursor(text: str) -> tuple[float, str]:
    """Decode a cursor that `encode_cursor` wrote.

    Raises:
        InvalidInput: the text is not such a cursor.
    """
    try:
        if len(text) > MAX_CURSOR_BYTES:
            raise ValueError
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        risk, engine_id = msgspec.json.decode(raw, type=tuple[float, str])
        if not math.isfinite(risk) or "\0" in engine_id:
            raise ValueError
    except (ValueError, msgspec.MsgspecError):
        message = "expected the value of `next` of the previous page"
        raise invalid_input(("next",), message) from None
    return risk, engine_id
