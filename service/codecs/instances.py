"""JSON numbers to arrays, and the name of the place when one is wrong. Knows schemas, windows and shapes, no HTTP.

Arrays are built whole, which is fast and forgives nothing; only a suspicious one is walked value by value to find the
fault, so that a good request never pays for the explanation of a bad one.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from model import numerics, windows
from model.numerics import Floats
from service.codecs.faults import TOO_LARGE, Loc, missing_reading, wrong_channels, wrong_count
from service.codecs.json_numbers import (
    LONG_ROW,
    PIECE,
    brackets,
    columns,
    fits_float32,
    pieces,
    table,
    tables,
    to_float32,
)
from service.codecs.requests import Instance, Label, describe
from service.errors import Fault, InvalidInput, MalformedJson
from service.inference.model_loader import Batch, Model

MOST_DIGITS = 400  # of an integer; what has more is not even a float64
MOST_LISTS = 4096  # beyond what is right; more are not made objects of, to name the place of the first
TOGETHER = 1 << 17  # bytes of telemetry that are parsed at once; some more where the last is long
LOOK_BACK = 4096  # rows looked at together for a value to hold
MOST_FAULTS = 20  # a whole wrong file does not need a million lines to be understood
JsonValue = Any


class Decoded(NamedTuple):
    """A batch ready for the network: telemetry (N, *input_shape), targets (N, C) or None, held values per channel."""

    telemetry: Batch
    targets: Floats | None
    imputed: npt.NDArray[np.int64] | None


def decode_instances(instances: list[Instance], model: Model, hold: bool) -> Decoded:
    """Windows padded, missing values held if asked, labels as distributions over the classes.

    Args:
        instances: of which the telemetry is JSON still.
        model: whose input they shall be.
        hold: whether a missing value is the last one seen.

    Raises:
        InvalidInput: names instance, row and channel of what is wrong, at most twenty places.
    """
    faults: list[Fault] = []
    channels = model.channels
    batch = np.empty((len(instances), *model.input_shape), dtype=np.float32)
    imputed = np.zeros(len(channels), dtype=np.int64)
    window = model.manifest.window
    for begin, texts, found in _read(instances, channels, hold or window is None):
        if found is not None and window is not None:
            batch[begin : begin + len(texts)] = _newest(found, window)
            continue
        for i, text in enumerate(texts, begin):
            if len(faults) >= MOST_FAULTS:
                break
            loc, held = ("instances", i, "telemetry"), None
            values: Batch | None
            if window is None:
                values = _tensor(text, model.input_shape, loc, faults)
            else:
                values, held = _window(text, window, channels, hold, loc, faults)
            if held is not None:
                imputed += held
            if values is not None:
                batch[i] = values
        if len(faults) >= MOST_FAULTS:
            break
    targets = decode_labels(
        [x.label for x in instances], model.manifest.classes, faults, lambda i: ("instances", i, "label")
    )
    refuse(faults)
    return Decoded(batch, targets, imputed if hold else None)


def _read(
    instances: list[Instance], channels: tuple[str, ...], singly: bool
) -> Iterator[tuple[int, list[bytes], Sequence[Batch] | Batch | None]]:
    """The first of some instances, their telemetry as JSON, and as rows where it is usual and was read together."""
    texts: list[bytes] = []
    size = 0
    for k, instance in enumerate(instances):
        texts.append(bytes(instance.telemetry))
        size += len(texts[-1])
        if singly or size > TOGETHER or k == len(instances) - 1:
            usual = not singly and size <= PIECE and all(text[:1] == b"[" for text in texts)
            yield k + 1 - len(texts), texts, tables(texts, len(channels)) if usual else None
            texts, size = [], 0


def _newest(histories: Sequence[Batch] | Batch, window: int) -> Batch | list[Batch]:
    """The newest window of each, at once where all have as many rows, and enough."""
    if isinstance(histories, np.ndarray) and histories.shape[1] >= window:
        return histories[:, -window:]
    return [windows.pad_left(history, window) for history in histories]


def refuse(faults: list[Fault]) -> None:
    """Raise if anything is wrong; the detail is the first fault in words."""
    if faults:
        raise InvalidInput(f"{describe(faults[0].loc)}: {faults[0].msg}", tuple(faults[:MOST_FAULTS]))


def _window(
    text: bytes, window: int, channels: tuple[str, ...], hold: bool, loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64] | None]:
    """The newest window of an instance, and how many values were held; None after naming what is wrong."""
    values = _history(text, channels, hold)
    if values is None:
        values = _suspicious(text, channels, hold, loc, faults)
    if values is None:
        return None, None
    if not hold:
        return values if len(values) == window else windows.pad_left(values, window), None
    return hold_window(values, window, channels, loc, faults)


def _history(text: bytes, channels: tuple[str, ...], hold: bool) -> Batch | None:
    """Rows, or columns by name, as (T, channels); None if anything is unusual."""
    found = columns(text, channels, hold) if text[:1] == b"{" else table(text, len(channels), hold)
    return None if found is None else to_float32(found, hold)


def _suspicious(text: bytes, channels: tuple[str, ...], hold: bool, loc: Loc, faults: list[Fault]) -> Batch | None:
    if text[:1] == b"{" and brackets(text) > len(channels) + MOST_LISTS:
        faults.append(Fault(loc, f"expected a list of values for each of {len(channels)} channels, got more lists"))
        return None
    found, before = [], 0
    for value in _parts(text, loc):
        rows = _by_name(value, channels, loc, faults)
        if rows is None:
            return None
        if not isinstance(rows, list) or not rows:
            faults.append(Fault(loc, "expected at least one row of readings"))
            return None
        found.append(_numbers(rows, channels, hold, loc, faults, before))
        before += len(rows)
        if len(faults) >= MOST_FAULTS:
            break
    return None if any(part is None for part in found) else np.concatenate(found)  # type: ignore[arg-type]  # none is None


def hold_window(
    values: Batch, window: int, channels: tuple[str, ...], loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64]]:
    """The newest window of a history (T, channels), missing values held, and how many were, per channel.

    None after naming the first place where there is nothing to hold.
    """
    before = max(len(values) - window, 0)  # rows that may give a value to hold, and are not seen themselves
    held = windows.hold_last(np.concatenate([_last_seen(values[:before]), values[before:]]))[0][1:]
    row, channel = np.nonzero(np.isnan(held))
    if len(row):
        place = (*loc, before + int(row[0]), channels[channel[0]])
        faults.append(Fault(place, "missing, and no earlier value of this channel to hold"))
        return None, np.zeros(len(channels), dtype=np.int64)
    return windows.pad_left(held, window), np.isnan(values[before:]).sum(axis=0)


def _last_seen(values: Batch) -> Batch:
    """The last value of each channel (1, channels), NaN where none was seen; looked for from the end."""
    found = np.full((1, values.shape[1]), np.nan, dtype=np.float32)
    for end in range(len(values), 0, -LOOK_BACK):
        held = windows.hold_last(values[max(end - LOOK_BACK, 0) : end])[0][-1:]
        found = np.where(np.isnan(found), held, found)
        if not np.isnan(found).any():
            break
    return found


def _parts(text: bytes, loc: Loc) -> Iterator[JsonValue]:
    """A value; the rows of a long list a piece at a time: what is nothing but brackets takes 70 times its bytes.

    Raises:
        MalformedJson, InvalidInput: it is none, or full of objects, or has no rows.
    """
    if brackets(text, b"{") > MOST_LISTS:
        refuse([Fault(loc, "expected numbers, got many objects")])
    for k, piece in enumerate(pieces(text) if text[:1] == b"[" else [text]):
        if len(piece) > LONG_ROW and text[:1] == b"[":
            refuse([Fault(loc, f"expected rows of numbers, got one of more than {LONG_ROW} bytes")])
        value = _loads(piece, loc)
        if k and value == []:
            raise MalformedJson(f"{describe(loc)} is not JSON: there is no value behind a comma")
        yield value


def _loads(text: bytes, loc: Loc) -> JsonValue:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:  # Python's own parser reads numbers that no float holds, so that the place of one can be named
            return json.loads(text, parse_constant=_no_constant, parse_int=_integer)
        except (ValueError, RecursionError):
            raise MalformedJson(f"{describe(loc)} is not JSON: {error}") from None


def _no_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON")


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < MOST_DIGITS else float(digits)  # infinite, which is refused by its place


def _by_name(value: JsonValue, channels: tuple[str, ...], loc: Loc, faults: list[Fault]) -> JsonValue:
    """An object of channel columns as rows; anything else unchanged. None if it has a fault, or is null."""
    if not isinstance(value, dict):
        if value is None and not faults:
            faults.append(Fault(loc, "expected rows of readings, got null"))
        return value
    wrong = wrong_channels(value, channels, loc)
    wrong += [Fault((*loc, name), "expected a list of values") for name, v in value.items() if not isinstance(v, list)]
    if not wrong:
        length = len(value[channels[0]])
        wrong = [
            Fault((*loc, n), f"has {len(value[n])} values, {channels[0]} has {length}")
            for n in channels
            if len(value[n]) != length
        ]
    faults.extend(wrong)
    return None if wrong else [list(row) for row in zip(*(value[name] for name in channels), strict=True)]


def _numbers(
    rows: list[JsonValue], channels: tuple[str, ...], hold: bool | None, loc: Loc, faults: list[Fault], before: int = 0
) -> Batch | None:
    """Rows as (T, channels) float32, value by value, missing ones as NaN; None after naming what is wrong.

    `before` are the rows that came before these.
    """
    known, fit = len(faults), all(isinstance(row, list) and len(row) == len(channels) for row in rows)
    # of millions of empty rows nothing is kept, but that they are wrong
    found = np.full((len(rows) if fit else 0, len(channels)), np.nan, dtype=np.float32)
    for t, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(channels):
            got = f"{len(row)} values" if isinstance(row, list) else _kind(row)
            faults.append(Fault((*loc, before + t), wrong_count(f"a row of {len(channels)} numbers", got)))
        else:
            for k, value in enumerate(row):
                problem = _problem(value, hold)
                if problem:
                    faults.append(Fault((*loc, before + t, channels[k]), problem))
                elif fit and value is not None:
                    found[t, k] = value
        if len(faults) >= MOST_FAULTS:
            break
    return found if len(faults) == known else None


def _problem(value: JsonValue, hold: bool | None) -> str | None:
    """What is wrong with a value; `hold` is None where nothing can be held."""
    if value is None and hold is not None:
        return None if hold else missing_reading('"missing": "hold"')
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"expected a number, got {_kind(value)}"
    return None if fits_float32(value) else TOO_LARGE


def _kind(value: JsonValue) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _tensor(text: bytes, shape: tuple[int, ...], loc: Loc, faults: list[Fault]) -> Batch | None:
    """Numbers of any shape; None after naming the first place that is wrong."""
    lists = sum(math.prod(shape[:k]) for k in range(len(shape)))
    if brackets(text) > lists + MOST_LISTS:
        faults.append(Fault(loc, f"expected finite numbers of shape {list(shape)}, got more lists"))
        return None
    values = _loads(text, loc)
    fault = _misfit(values, shape, loc)
    if fault is not None:
        faults.append(fault)
        return None
    return np.array(values, dtype=np.float32).reshape(shape)


def _misfit(value: JsonValue, shape: tuple[int, ...], loc: Loc) -> Fault | None:
    """The first place where nested lists are not finite numbers of a shape."""
    if not shape:
        problem = _problem(value, None)
        return Fault(loc, problem) if problem else None
    if not isinstance(value, list) or len(value) != shape[0]:
        got = f"{len(value)} values" if isinstance(value, list) else _kind(value)
        return Fault(loc, wrong_count(f"finite numbers of shape {list(shape)}", got))
    if len(shape) == 1 and set(map(type, value)) <= {int, float} and all(map(fits_float32, value)):
        return None  # the usual; only what is not is looked at one by one
    parts = (_misfit(part, shape[1:], (*loc, k)) for k, part in enumerate(value))
    return next((fault for fault in parts if fault is not None), None)


def decode_logits(text: bytes, most: int) -> Floats:
    """JSON to logits (N, C) in float64.

    Raises:
        InvalidInput: not a table of finite numbers, or more than `most` rows.
    """
    found = table(text, text[: text.find(b"]")].count(b",") + 1)
    if found is None or to_float32(found) is None:
        found = _suspicious_logits(text)
    if len(found) > most:
        refuse([Fault(("logits",), f"{len(found)} rows, at most {most} are taken in one call")])
    return found


def _suspicious_logits(text: bytes) -> Floats:
    loc: Loc = ("logits",)
    faults: list[Fault] = []
    names: tuple[str, ...] = ()
    found, before = [], 0
    for rows in _parts(text, loc):
        if not (isinstance(rows, list) and rows and (names or (isinstance(rows[0], list) and rows[0]))):
            refuse([Fault(loc, "expected rows of logits, at least one class each")])
        names = names or tuple(str(k) for k in range(len(rows[0])))
        if _numbers(rows, names, None, loc, faults, before) is not None:
            found.append(np.array(rows, dtype=np.float64))
        before += len(rows)
        if len(faults) >= MOST_FAULTS:
            break
    refuse([Fault((*f.loc[:2], int(f.loc[2])) if len(f.loc) == 3 else f.loc, f.msg) for f in faults])
    return np.concatenate(found)


def decode_labels(
    labels: list[Label | None], classes: tuple[str, ...], faults: list[Fault], place: Any
) -> Floats | None:
    """Labels as distributions (N, C), a row of NaN where there is none; None if there is none at all."""
    if all(label is None for label in labels):
        return None
    targets = np.full((len(labels), len(classes)), np.nan)
    for i, label in enumerate(labels):
        if label is None:
            continue
        try:
            targets[i] = label_distribution(label, classes)
        except ValueError as error:
            faults.append(Fault(place(i), str(error)))
            if len(faults) >= MOST_FAULTS:
                break
    return targets


def label_distribution(label: Label, classes: tuple[str, ...]) -> Floats:
    """One label as probabilities (C,).

    Raises:
        ValueError: an unknown name, an index out of range, or a list that is no distribution over the classes.
    """
    if isinstance(label, str):
        if label not in classes:
            raise ValueError(f"unknown class {label[:50]!r}; classes are {', '.join(classes[:20])}")
        label = classes.index(label)
    if isinstance(label, int):
        if not 0 <= label < len(classes):
            raise ValueError(f"class index {str(label)[:20]} is not from 0 to {len(classes) - 1}")
        label = [float(k == label) for k in range(len(classes))]
    return numerics.as_distributions([label], len(classes))[0]  # type: ignore[no-any-return]  # numpy's indexing is Any
