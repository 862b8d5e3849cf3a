"""JSON instances and logits to arrays, for valid input; `diagnose` locates faults. Independent of HTTP."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model import windows
from model.numerics import Floats
from service.codecs.diagnose import decode_tensor, diagnose_history, diagnose_logits
from service.codecs.faults import MAX_FAULTS, Loc, refuse
from service.codecs.json_numbers import parse_columns, parse_joint_rows, parse_rows
from service.codecs.labels import decode_labels
from service.codecs.missing_values import hold_window
from service.codecs.number_parser import PARSE_BYTES, to_float32
from service.codecs.requests import Instance
from service.errors import Fault
from service.inference.onnx_model import Batch, Model

JOINT_PARSE_BYTES = 1 << 17  # bytes of telemetry that are parsed at once; some more where the last is long


class DecodedInstances(NamedTuple):
    """A batch ready for the network: telemetry (N, *input_shape), targets (N, C) or None, held values per channel."""

    telemetry: Batch
    targets: Floats | None
    imputed: npt.NDArray[np.int64] | None


def decode_instances(instances: list[Instance], model: Model, hold: bool) -> DecodedInstances:
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
    for begin, texts, found in _parse_groups(instances, channels, hold or window is None):
        if found is not None and window is not None:
            batch[begin : begin + len(texts)] = _newest_windows(found, window)
            continue
        for i, text in enumerate(texts, begin):
            if len(faults) >= MAX_FAULTS:
                break
            loc, held = ("instances", i, "telemetry"), None
            values: Batch | None
            if window is None:
                values = decode_tensor(text, model.input_shape, loc, faults)
            else:
                values, held = _decode_window(text, window, channels, hold, loc, faults)
            if held is not None:
                imputed += held
            if values is not None:
                batch[i] = values
        if len(faults) >= MAX_FAULTS:
            break
    targets = decode_labels(
        [x.label for x in instances], model.manifest.classes, faults, lambda i: ("instances", i, "label")
    )
    refuse(faults)
    return DecodedInstances(batch, targets, imputed if hold else None)


def _parse_groups(
    instances: list[Instance], channels: tuple[str, ...], singly: bool
) -> Iterator[tuple[int, list[bytes], Sequence[Batch] | Batch | None]]:
    """The first of some instances, their telemetry as JSON, and as rows where it is usual and was read together."""
    texts: list[bytes] = []
    size = 0
    for k, instance in enumerate(instances):
        texts.append(bytes(instance.telemetry))
        size += len(texts[-1])
        if singly or size > JOINT_PARSE_BYTES or k == len(instances) - 1:
            usual = not singly and size <= PARSE_BYTES and all(text[:1] == b"[" for text in texts)
            yield k + 1 - len(texts), texts, parse_joint_rows(texts, len(channels)) if usual else None
            texts, size = [], 0


def _newest_windows(histories: Sequence[Batch] | Batch, window: int) -> Batch | list[Batch]:
    """The newest window of each, at once where all have as many rows, and enough."""
    if isinstance(histories, np.ndarray) and histories.shape[1] >= window:
        return histories[:, -window:]
    return [windows.pad_left(history, window) for history in histories]


def _decode_window(
    text: bytes, window: int, channels: tuple[str, ...], hold: bool, loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64] | None]:
    """The newest window of an instance, and how many values were held; None after naming what is wrong."""
    values = _parse_history(text, channels, hold)
    if values is None:
        values = diagnose_history(text, channels, hold, loc, faults)
    if values is None:
        return None, None
    if not hold:
        return values if len(values) == window else windows.pad_left(values, window), None
    return hold_window(values, window, channels, loc, faults)


def _parse_history(text: bytes, channels: tuple[str, ...], hold: bool) -> Batch | None:
    """Rows, or columns by name, as (T, channels); None if anything is unusual."""
    found = parse_columns(text, channels, hold) if text[:1] == b"{" else parse_rows(text, len(channels), hold)
    return None if found is None else to_float32(found, hold)


def decode_logits(text: bytes, most: int) -> Floats:
    """JSON to logits (N, C) in float64.

    Raises:
        InvalidInput: not a table of finite numbers, or more than `most` rows.
    """
    found = parse_rows(text, text[: text.find(b"]")].count(b",") + 1)
    if found is None or to_float32(found) is None:
        found = diagnose_logits(text)
    if len(found) > most:
        refuse([Fault(("logits",), f"{len(found)} rows, at most {most} are taken in one call")])
    return found
