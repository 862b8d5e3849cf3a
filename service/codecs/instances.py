"""Decode JSON instances and logits into arrays; `diagnose` locates faults. Independent of HTTP."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model import windows
from model.numerics import Floats
from service.codecs.diagnose import decode_tensor, diagnose_history, diagnose_logits
from service.codecs.faults import MAX_FAULTS, Loc, check_row_count, refuse
from service.codecs.json_numbers import parse_columns, parse_joint_rows, parse_rows
from service.codecs.labels import decode_labels
from service.codecs.missing_values import hold_window
from service.codecs.number_parser import PARSE_BYTES, to_float32
from service.codecs.requests import Instance
from service.errors import Fault
from service.inference.onnx_model import Batch, Model

JOINT_PARSE_BYTES = 1 << 17  # of telemetry that is parsed together; the last text may exceed it


class DecodedInstances(NamedTuple):
    """A batch ready for the network: telemetry (N, *input_shape), targets (N, C) or None, held values per channel."""

    telemetry: Batch
    targets: Floats | None
    imputed: npt.NDArray[np.int64] | None


def decode_instances(instances: list[Instance], model: Model, hold: bool) -> DecodedInstances:
    """Return padded windows, and labels as distributions over the classes.

    Args:
        instances: the instances; their telemetry is raw JSON.
        model: the model, which defines the shape of its input.
        hold: whether a missing value is replaced by the last one of its channel.

    Raises:
        InvalidInput: wrong values, at most twenty, each with instance, row and channel.
    """
    faults: list[Fault] = []
    channels = model.channels
    batch = np.empty((len(instances), *model.input_shape), dtype=np.float32)
    imputed = np.zeros(len(channels), dtype=np.int64)
    window = model.manifest.window
    for begin, texts, histories in _parse_groups(instances, channels, hold or window is None):
        if histories is not None and window is not None:
            batch[begin : begin + len(texts)] = _newest_windows(histories, window)
            continue
        for i, text in enumerate(texts, begin):
            if len(faults) >= MAX_FAULTS:
                break
            loc, held_counts = ("instances", i, "telemetry"), None
            values: Batch | None
            if window is None:
                values = decode_tensor(text, model.input_shape, loc, faults)
            else:
                values, held_counts = _decode_window(text, window, channels, hold, loc, faults)
            if held_counts is not None:
                imputed += held_counts
            if values is not None:
                batch[i] = values
        if len(faults) >= MAX_FAULTS:
            break
    targets = decode_labels(
        [instance.label for instance in instances], model.manifest.classes, faults, lambda i: ("instances", i, "label")
    )
    refuse(faults)
    return DecodedInstances(batch, targets, imputed if hold else None)


def _parse_groups(
    instances: list[Instance], channels: tuple[str, ...], singly: bool
) -> Iterator[tuple[int, list[bytes], Sequence[Batch] | Batch | None]]:
    """Yield groups of instances: the index of the first, their telemetry as JSON, and their rows.

    The rows are None where the telemetry is unusual, or `singly` is set.
    """
    texts: list[bytes] = []
    group_bytes = 0
    for k, instance in enumerate(instances):
        texts.append(bytes(instance.telemetry))
        group_bytes += len(texts[-1])
        if singly or group_bytes > JOINT_PARSE_BYTES or k == len(instances) - 1:
            is_usual = not singly and group_bytes <= PARSE_BYTES and all(text[:1] == b"[" for text in texts)
            yield k + 1 - len(texts), texts, parse_joint_rows(texts, len(channels)) if is_usual else None
            texts, group_bytes = [], 0


def _newest_windows(histories: Sequence[Batch] | Batch, window: int) -> Batch | list[Batch]:
    """Return the newest window of each history; one slice if all have the same number of rows, and enough."""
    if isinstance(histories, np.ndarray) and histories.shape[1] >= window:
        return histories[:, -window:]
    return [windows.pad_left(history, window) for history in histories]


def _decode_window(
    text: bytes, window: int, channels: tuple[str, ...], hold: bool, loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64] | None]:
    """Return the newest window of an instance, and the number of held values per channel.

    The window is None after its faults are appended to `faults`.
    """
    values = _parse_history(text, channels, hold)
    if values is None:
        values = diagnose_history(text, channels, hold, loc, faults)
    if values is None:
        return None, None
    if not hold:
        return values if len(values) == window else windows.pad_left(values, window), None
    return hold_window(values, window, channels, loc, faults)


def _parse_history(text: bytes, channels: tuple[str, ...], hold: bool) -> Batch | None:
    """Return rows, or columns by name, as (T, channels); None for unusual text."""
    values = parse_columns(text, channels, hold) if text[:1] == b"{" else parse_rows(text, len(channels), hold)
    return None if values is None else to_float32(values, hold)


def decode_logits(text: bytes, max_rows: int) -> Floats:
    """Return JSON logits (N, C) in float64.

    Raises:
        MalformedJson: the text is not JSON.
        InvalidInput: it is not a table of finite numbers, or has more than `max_rows` rows.
    """
    logits = parse_rows(text, text[: text.find(b"]")].count(b",") + 1)
    if logits is None or to_float32(logits) is None:
        logits = diagnose_logits(text)
    check_row_count("logits", len(logits), max_rows)
    return logits
