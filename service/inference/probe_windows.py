"""Flights that prove a graph beside the network's own: every kind of row that the two might see otherwise."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import Conditions, Manifest
from model.evaluation.occlusion import ConditionBaselines
from model.windows import overlapping

Rows = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
CALM = 2**10  # rows of noise in the flights that prove a graph
KINDS = ("held", "coarse", "copied", "scaled", "odd")  # of spells in them
SPELLS = (3, 4, 5, 8)  # rows of a spell; one of each kind is longer than a window
ODD = (0.0, -0.0, 1e-40, 3e38, -3e38)  # readings that no healthy sensor gives
BORDER = 0.5  # setting scales from what is usual in a condition; a row beyond is of none that training saw
SIZES = (1, 1, 1, 1, 7, 7, 64, 64, 64)  # windows of the batches that prove a graph which answers any batch


def batches(manifest: Manifest) -> Iterator[Rows]:
    """Windows from all over the flights, some at a time: (N, window, channels)."""
    windows = overlapping(flown(manifest), manifest.window or 1)
    chosen = np.linspace(0, len(windows) - 1, sum(SIZES)).astype(np.int64)
    for some in np.split(np.random.default_rng(0).permutation(chosen), np.cumsum(SIZES)[:-1]):
        yield np.ascontiguousarray(windows[some])


def bits(outputs: Iterable[Rows | None]) -> npt.NDArray[Any]:
    """Answers (N, classes + 1) as they are written."""
    return np.column_stack([column.view(np.int32) for column in outputs if column is not None])


def flown(manifest: Manifest) -> Rows:
    """The golden windows, an engine from its first flight on, spells of every kind and length, conditions' borders."""
    random = np.random.default_rng(0)
    golden = np.array([one.telemetry for one in manifest.golden], np.float32)
    flights, window = golden.reshape(-1, golden.shape[-1]), golden.shape[1]

    def noise(count: int) -> Rows:
        drawn = flights[np.arange(count) % len(flights)]
        return (drawn * (1 + 1e-3 * random.standard_normal(drawn.shape))).astype(np.float32)

    calm = noise(CALM)
    parts = [flights, np.repeat(calm[:1], window - 1, axis=0), calm]
    for how in KINDS:
        for length in (*SPELLS, window + max(SPELLS)):
            rows = noise(window + length)
            _spoil(rows[window // 2 :][:length], random.choice([True, False], rows.shape[1]), how, random)
            parts.append(rows)
    if manifest.conditions is not None:
        parts.append(_border(noise(window + max(SPELLS)), manifest.conditions, random))
    return np.concatenate(parts)


def _border(rows: Rows, conditions: Conditions, random: np.random.Generator) -> Rows:
    """Rows so far from their conditions that the last bit of a sum tells whether they are of them."""
    usual = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
    away = random.standard_normal((len(rows), len(usual.scales)))
    away *= BORDER * usual.scales / np.linalg.norm(away, axis=1, keepdims=True)
    settings = usual.matching_rows(rows)[:, : len(usual.scales)] + away
    return np.concatenate([settings, rows[:, len(usual.scales) :]], axis=1, dtype=np.float32)


def _spoil(rows: Rows, some: Mask, how: str, random: np.random.Generator) -> None:
    """Let some channels (C,) be so, in place."""
    if how == "held":
        rows[:, some] = rows[0, some]
    elif how == "coarse":  # three in four readings are those of before
        for row, before in zip(rows[1:], rows, strict=False):
            np.copyto(row, before, where=some & (random.random(len(some)) < 0.75))
    elif how == "copied":
        rows[:] = rows[0]
    elif how == "scaled":  # from hardly to twice
        rows[:, some] *= (1 + 10 ** random.uniform(-4, 0, some.sum())).astype(np.float32)
    elif how == "odd":
        rows[:, some] = random.choice(ODD, (len(rows), some.sum()))
