"""JSON numbers to arrays, and the name of the place when one is wrong. Knows schemas, windows and shapes, no HTTP.

Arrays are built whole, which is fast and forgives nothing; only a suspicious one is walked value by value to find the
fault, so that a good request never pays for the explanation of a bad one.
"""

import json
import threading
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import simdjson
from msgspec import Raw

from model import numerics, windows
from model.numerics import Floats
from service.api.schemas import Instance, Label, describe
from service.errors import Fault, InvalidInput, NotJson
from service.runtime import Batch, Model

Loc = tuple[str | int, ...]
PIECE = 1 << 20  # bytes parsed at a time; a millisecond or two
FLOAT32_MOST = float(np.finfo(np.float32).max) + 2.0**102  # less than this is rounded to the largest float32
MOST_FAULTS = 20  # a whole wrong file does not need a million lines to be understood
JsonValue = Any


class Decoded(NamedTuple):
    """A batch ready for the network: telemetry (N, *input_shape), targets (N, C) or None, held values per channel."""

    telemetry: Batch
    targets: Floats | None
    imputed: npt.NDArray[np.int64] | None


def decode_instances(instances: list[Instance], model: Model, hold: bool) -> Decoded:
    """Windows padded, missing values held if asked, labels as distributions over the classes.

    Raises:
        InvalidInput: names instance, row and channel of what is wrong, at most twenty places.
    """
    faults: list[Fault] = []
    channels = model.channels
    batch = np.empty((len(instances), *model.input_shape), dtype=np.float32)
    imputed = np.zeros(len(channels), dtype=np.int64)
    window = model.manifest.window
    for i, instance in enumerate(instances):
        table = None if hold or window is None else _table(instance.telemetry, len(channels))
        if table is not None and window is not None:
            batch[i] = table if len(table) == window else windows.pad_left(table, window)
            continue
        loc = ("instances", i, "telemetry")
        if window is None:
            values = _tensor(instance.telemetry, model.input_shape, loc, faults)
        else:
            values, held = _window(instance.telemetry, window, channels, hold, loc, faults)
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


def refuse(faults: list[Fault]) -> None:
    """Raise if anything is wrong; the detail is the first fault in words."""
    if faults:
        raise InvalidInput(f"{describe(faults[0].loc)}: {faults[0].msg}", tuple(faults[:MOST_FAULTS]))


def _window(
    raw: Raw, window: int, channels: tuple[str, ...], hold: bool, loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64]]:
    none_held = np.zeros(len(channels), dtype=np.int64)
    rows = _by_name(_loads(raw, loc), channels, loc, faults)
    if rows is None:
        return None, none_held
    if not isinstance(rows, list) or not rows:
        faults.append(Fault(loc, "expected at least one row of readings"))
        return None, none_held
    values = _numbers(raw, rows, channels, hold, loc, faults)
    if values is None:
        return None, none_held
    if not hold:
        return windows.pad_left(values, window), none_held
    return hold_window(values, window, channels, loc, faults)


def hold_window(
    values: Batch, window: int, channels: tuple[str, ...], loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64]]:
    """The newest window of a history (T, channels), missing values held, and how many were, per channel.

    None after naming the first place where there is nothing to hold.
    """
    held, _ = windows.hold_last(values)
    before = max(len(held) - window, 0)  # rows that may give a value to hold, and are not seen themselves
    row, channel = np.nonzero(np.isnan(held[before:]))
    if len(row):
        place = (*loc, before + int(row[0]), channels[channel[0]])
        faults.append(Fault(place, "missing, and no earlier value of this channel to hold"))
        return None, np.zeros(len(channels), dtype=np.int64)
    return windows.pad_left(held, window), np.isnan(values[before:]).sum(axis=0)


_parsers = threading.local()  # one parser a thread: its buffers are reused


def _table(raw: Raw, width: int) -> Batch | None:
    """Rows of `width` numbers straight into an array, no Python object for a number; None if anything is unusual.

    Pieces, because a parser holds the interpreter until it is done, and others are waiting to be answered.
    """
    text, parts = bytes(raw), []
    for piece in [text] if len(text) <= PIECE else _pieces(text):
        flat = _flat(piece, "d", width)
        if flat is None:
            return None
        parts.append(flat)
    values = to_float32(parts[0] if len(parts) == 1 else np.concatenate(parts))
    return None if values is None else values.reshape(-1, width)


def flat_numbers(raw: Raw, dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    """All numbers of a flat or nested list in their order; None if something is none, or does not fit the dtype."""
    flat = _flat(bytes(raw), "d" if dtype.kind == "f" else "i", None)
    return to_float32(flat) if flat is not None and dtype.kind == "f" else flat


def _flat(text: bytes, kind: Literal["d", "i"], width: int | None) -> npt.NDArray[Any] | None:
    """The numbers of a list, of which every row must have `width` if that is given; None if it is no such list."""
    if not hasattr(_parsers, "own"):
        _parsers.own = simdjson.Parser()
    try:
        rows = _parsers.own.parse(text)
        if not isinstance(rows, simdjson.Array):
            return None
        lengths = set(map(len, rows)) if width else set()  # type: ignore[arg-type]  # a number has none, which is caught below
        if width and (lengths != {width} or text.count(b"[") != len(rows) + 1):
            return None  # the second: a list within a row would be flattened without a word
        return np.frombuffer(rows.as_buffer(of_type=kind), dtype=np.float64 if kind == "d" else np.int64)
    except (ValueError, TypeError, RuntimeError):  # not JSON, or something in it is no number
        return None


def _pieces(text: bytes) -> list[bytes]:
    """A table of rows cut between rows, each piece a table; nonsense if it is no table, which the parser finds."""
    found, begin = [], 0
    while len(text) - begin > PIECE:
        end = text.find(b"]", begin + PIECE)
        comma = text.find(b",", end)
        if end < 0 or comma < 0:
            break
        found.append((b"" if begin == 0 else b"[") + text[begin : end + 1] + b"]")
        begin = comma + 1
    return [*found, (b"" if begin == 0 else b"[") + text[begin:]]


def _loads(raw: Raw, loc: Loc) -> JsonValue:
    try:
        return orjson.loads(memoryview(raw))
    except orjson.JSONDecodeError as error:
        try:  # Python's own parser reads numbers that no float holds, so that the place of one can be named
            return json.loads(bytes(raw), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise NotJson(f"{describe(loc)} is not JSON: {error}") from None


def _no_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON")


def _by_name(value: JsonValue, channels: tuple[str, ...], loc: Loc, faults: list[Fault]) -> JsonValue:
    """An object of channel columns as rows; anything else unchanged. None if it has a fault, or is null."""
    if not isinstance(value, dict):
        if value is None and not faults:
            faults.append(Fault(loc, "expected rows of readings, got null"))
        return value
    wrong = [Fault((*loc, name), "unknown channel") for name in value if name not in channels]
    wrong += [Fault((*loc, name), "channel is missing") for name in channels if name not in value]
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
    raw: Raw, rows: list[JsonValue], channels: tuple[str, ...], hold: bool | None, loc: Loc, faults: list[Fault]
) -> Batch | None:
    """Rows as (T, channels) float32, missing values as NaN; None after naming what is wrong."""
    values = _quick(raw, rows)
    if values is not None and values.shape == (len(rows), len(channels)):
        return values
    before, found = len(faults), np.full((len(rows), len(channels)), np.nan, dtype=np.float32)
    for t, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(channels):
            got = f"{len(row)} values" if isinstance(row, list) else _kind(row)
            faults.append(Fault((*loc, t), f"expected a row of {len(channels)} numbers, got {got}"))
        else:
            for k, value in enumerate(row):
                problem = _problem(value, hold)
                if problem:
                    faults.append(Fault((*loc, t, channels[k]), problem))
                elif value is not None:
                    found[t, k] = value
        if len(faults) >= MOST_FAULTS:
            break
    return found if len(faults) == before else None


def _quick(raw: Raw, rows: JsonValue) -> Batch | None:
    """The array if every value is surely a number that float32 can hold, else None. numpy takes true for 1."""
    text = bytes(raw)
    if b"true" in text or b"false" in text:
        return None
    try:
        values = np.array(rows)
    except (ValueError, OverflowError):
        return None
    return to_float32(values) if values.dtype.kind in "fiu" else None


def to_float32(values: npt.NDArray[Any]) -> Batch | None:
    """Values in float32, or None if one is not finite there: 1e39 passes every JSON parser and is infinite here."""
    flat = values.ravel()
    # the sum of squares is the cheapest look at all of them; only a suspicious one is followed by a second
    with np.errstate(over="ignore", invalid="ignore"):
        small = flat.dot(flat) < FLOAT32_MOST
    if not small and not (np.abs(flat) < FLOAT32_MOST).all():  # also when one is NaN
        return None
    return values.astype(np.float32)


def _problem(value: JsonValue, hold: bool | None) -> str | None:
    """What is wrong with a value; `hold` is None where nothing can be held."""
    if value is None and hold is not None:
        return None if hold else 'missing; "missing": "hold" would repeat the last seen value'
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"expected a number, got {_kind(value)}"
    return None if fits_float32(value) else "too large for a 32-bit float"


def fits_float32(value: float) -> bool:
    """Whether a number is finite after the cast to float32."""
    with np.errstate(over="ignore"):
        try:
            return bool(np.isfinite(np.float32(value)))
        except OverflowError:  # an integer that not even a float holds
            return False


def _kind(value: JsonValue) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _tensor(raw: Raw, shape: tuple[int, ...], loc: Loc, faults: list[Fault]) -> Batch | None:
    values = _quick(raw, _loads(raw, loc))
    if values is not None and values.shape == shape:
        return values
    if not faults or faults[-1].loc != loc:
        faults.append(Fault(loc, f"expected finite numbers of shape {list(shape)}"))
    return None


def decode_logits(raw: Raw, most: int) -> Floats:
    """Logits (N, C) in float64.

    Raises:
        InvalidInput: not a table of finite numbers, or more than `most` rows.
    """
    faults: list[Fault] = []
    rows = _loads(raw, ("logits",))
    if not (isinstance(rows, list) and rows and isinstance(rows[0], list) and rows[0]):
        faults.append(Fault(("logits",), "expected rows of logits, at least one class each"))
    refuse(faults)
    if len(rows) > most:
        refuse([Fault(("logits",), f"{len(rows)} rows, at most {most} are taken in one call")])
    names = tuple(str(k) for k in range(len(rows[0])))
    _numbers(raw, rows, names, None, ("logits",), faults)
    refuse([Fault((*f.loc[:2], int(f.loc[2])) if len(f.loc) == 3 else f.loc, f.msg) for f in faults])
    return np.array(rows, dtype=np.float64)


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
