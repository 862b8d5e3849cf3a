"""Locate the first faults of JSON numbers, value by value. Used only where the fast parsers declined a text."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from model.numerics import Floats
from service.codecs.faults import (
    MAX_FAULTS,
    TOO_LARGE,
    Loc,
    describe,
    missing_reading,
    refuse,
    wrong_channels,
    wrong_count,
)
from service.codecs.json_numbers import MAX_ROW_BYTES, split_rows
from service.codecs.number_parser import count_brackets, fits_float32
from service.errors import Fault, MalformedJson
from service.inference.onnx_model import Batch

MAX_INTEGER_DIGITS = 400  # longer integers exceed float64
MAX_EXTRA_LISTS = 4096  # beyond the expected ones; text with more is rejected before it is parsed
JsonValue = Any


def diagnose_history(text: bytes, channels: tuple[str, ...], hold: bool, loc: Loc, faults: list[Fault]) -> Batch | None:
    """Return the rows (T, channels) of an unusual history; None after its faults are appended to `faults`."""
    if text[:1] == b"{" and count_brackets(text) > len(channels) + MAX_EXTRA_LISTS:
        faults.append(Fault(loc, f"expected a list of values for each of {len(channels)} channels, got more lists"))
        return None
    parts: list[Batch | None] = []
    rows_before = 0
    for value in _parse_parts(text, loc):
        rows = _rows_from_columns(value, channels, loc, faults)
        if rows is None:
            return None
        if not isinstance(rows, list) or not rows:
            faults.append(Fault(loc, "expected at least one row of readings"))
            return None
        parts.append(_check_rows(rows, channels, hold, loc, faults, rows_before))
        rows_before += len(rows)
        if len(faults) >= MAX_FAULTS:
            break
    return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]  # none is None


def _parse_parts(text: bytes, loc: Loc) -> Iterator[JsonValue]:
    """Yield the value of a text; of a long list, yield its rows in several parts, each a list.

    Parsed as a whole, a text of brackets only would take 70 times its bytes.

    Raises:
        MalformedJson: the text is not JSON.
        InvalidInput: it has many objects, or a row that is too long.
    """
    if count_brackets(text, b"{") > MAX_EXTRA_LISTS:
        refuse([Fault(loc, "expected numbers, got many objects")])
    for k, piece in enumerate(split_rows(text) if text[:1] == b"[" else [text]):
        if len(piece) > MAX_ROW_BYTES and text[:1] == b"[":
            refuse([Fault(loc, f"expected rows of numbers, got one of more than {MAX_ROW_BYTES} bytes")])
        value = _load_value(piece, loc)
        if k and value == []:
            raise MalformedJson(f"{describe(loc)} is not JSON: a value is missing after a comma")
        yield value


def _load_value(text: bytes, loc: Loc) -> JsonValue:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:  # Python's own parser reads numbers of any size, so that their place can be reported
            return json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_integer)
        except (ValueError, RecursionError):
            raise MalformedJson(f"{describe(loc)} is not JSON: {error}") from None


def _refuse_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON")


def _parse_integer(digits: str) -> float:
    return int(digits) if len(digits) < MAX_INTEGER_DIGITS else float(digits)  # infinite, and rejected later


def _rows_from_columns(value: JsonValue, channels: tuple[str, ...], loc: Loc, faults: list[Fault]) -> JsonValue:
    """Return an object of channel columns as rows; any other value unchanged. None if it has a fault, or is null."""
    if not isinstance(value, dict):
        if value is None and not faults:
            faults.append(Fault(loc, "expected rows of readings, got null"))
        return value
    wrong = wrong_channels(value, channels, loc)
    wrong += [Fault((*loc, name), "expected a list of values") for name, v in value.items() if not isinstance(v, list)]
    if not wrong:
        length = len(value[channels[0]])
        wrong = [
            Fault((*loc, name), f"has {len(value[name])} values, {channels[0]} has {length}")
            for name in channels
            if len(value[name]) != length
        ]
    faults.extend(wrong)
    return None if wrong else [list(row) for row in zip(*(value[name] for name in channels), strict=True)]


def _check_rows(
    rows: list[JsonValue], channels: tuple[str, ...], hold: bool | None, loc: Loc, faults: list[Fault], rows_before: int
) -> Batch | None:
    """Return rows as (T, channels) float32, missing values as NaN; None after their faults are appended to `faults`.

    `rows_before` is the number of rows in earlier parts of the text.
    """
    earlier_faults = len(faults)
    right_shape = all(isinstance(row, list) and len(row) == len(channels) for row in rows)
    # no memory is allocated for rows of a wrong length, which may be millions of empty ones
    values = np.full((len(rows) if right_shape else 0, len(channels)), np.nan, dtype=np.float32)
    for t, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(channels):
            got = f"{len(row)} values" if isinstance(row, list) else _json_type(row)
            faults.append(Fault((*loc, rows_before + t), wrong_count(f"a row of {len(channels)} numbers", got)))
        else:
            for k, value in enumerate(row):
                problem = _value_fault(value, hold)
                if problem:
                    faults.append(Fault((*loc, rows_before + t, channels[k]), problem))
                elif right_shape and value is not None:
                    values[t, k] = value
        if len(faults) >= MAX_FAULTS:
            break
    return values if len(faults) == earlier_faults else None


def _value_fault(value: JsonValue, hold: bool | None) -> str | None:
    """Return the fault of a value; None if it has none. `hold` is None where missing values cannot be held."""
    if value is None and hold is not None:
        return None if hold else missing_reading('"missing": "hold"')
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"expected a number, got {_json_type(value)}"
    return None if fits_float32(value) else TOO_LARGE


def _json_type(value: JsonValue) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def decode_tensor(text: bytes, shape: tuple[int, ...], loc: Loc, faults: list[Fault]) -> Batch | None:
    """Return numbers of any shape; None after the first fault is appended to `faults`."""
    lists = sum(math.prod(shape[:k]) for k in range(len(shape)))
    if count_brackets(text) > lists + MAX_EXTRA_LISTS:
        faults.append(Fault(loc, f"expected finite numbers of shape {list(shape)}, got more lists"))
        return None
    values = _load_value(text, loc)
    fault = _find_misfit(values, shape, loc)
    if fault is not None:
        faults.append(fault)
        return None
    return np.array(values, dtype=np.float32).reshape(shape)


def _find_misfit(value: JsonValue, shape: tuple[int, ...], loc: Loc) -> Fault | None:
    """Return the first place where nested lists are not finite numbers of a shape; None if they are."""
    if not shape:
        problem = _value_fault(value, None)
        return Fault(loc, problem) if problem else None
    if not isinstance(value, list) or len(value) != shape[0]:
        got = f"{len(value)} values" if isinstance(value, list) else _json_type(value)
        return Fault(loc, wrong_count(f"finite numbers of shape {list(shape)}", got))
    if len(shape) == 1 and set(map(type, value)) <= {int, float} and all(map(fits_float32, value)):
        return None  # the usual case; other values are examined one by one
    parts = (_find_misfit(part, shape[1:], (*loc, k)) for k, part in enumerate(value))
    return next((fault for fault in parts if fault is not None), None)


def diagnose_logits(text: bytes) -> Floats:
    """Return unusual logits (N, C).

    Raises:
        MalformedJson: the text is not JSON.
        InvalidInput: it is not a table of finite numbers, with the first faults.
    """
    loc: Loc = ("logits",)
    faults: list[Fault] = []
    names: tuple[str, ...] = ()
    parts, rows_before = [], 0
    for rows in _parse_parts(text, loc):
        if not (isinstance(rows, list) and rows and (names or (isinstance(rows[0], list) and rows[0]))):
            refuse([Fault(loc, "expected rows of logits, at least one class each")])
        names = names or tuple(str(k) for k in range(len(rows[0])))
        if _check_rows(rows, names, None, loc, faults, rows_before) is not None:
            parts.append(np.array(rows, dtype=np.float64))
        rows_before += len(rows)
        if len(faults) >= MAX_FAULTS:
            break
    refuse([Fault((*f.loc[:2], int(f.loc[2])) if len(f.loc) == 3 else f.loc, f.msg) for f in faults])
    return np.concatenate(parts)
