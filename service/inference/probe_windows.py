"""Flights that prove a graph beside the network's own: every kind of row that the two might see otherwise."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import Conditions, Manifest
from model.evaluation.occlusion import ConditionBaselines
from model.windows import overlapping

ProbeRows = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
NOISE_ROWS = 2**10  # rows of noise in the flights that prove a graph
CORRUPTIONS = ("held", "coarse", "copied", "scaled", "odd")  # of spells in them
CORRUPTED_ROWS = (3, 4, 5, 8)  # rows of a spell; one of each kind is longer than a window
EXTREME_VALUES = (0.0, -0.0, 1e-40, 3e38, -3e38)  # readings that no healthy sensor gives
CONDITION_BORDER = 0.5  # setting scales from what is usual in a condition; a row beyond is of none that training saw
BATCH_SIZES = (1, 1, 1, 1, 7, 7, 64, 64, 64)  # windows of the batches that prove a graph which answers any batch


def probe_batches(manifest: Manifest) -> Iterator[ProbeRows]:
    """Windows from all over the flights, some at a time: (N, window, channels)."""
    windows = overlapping(probe_history(manifest), manifest.window or 1)
    chosen = np.linspace(0, len(windows) - 1, sum(BATCH_SIZES)).astype(np.int64)
    for some in np.split(np.random.default_rng(0).permutation(chosen), np.cumsum(BATCH_SIZES)[:-1]):
        yield np.ascontiguousarray(windows[some])


def bit_patterns(outputs: Iterable[ProbeRows | None]) -> npt.NDArray[Any]:
    """Answers (N, classes + 1) as they are written."""
    return np.column_stack([column.view(np.int32) for column in outputs if column is not None])


def probe_history(manifest: Manifest) -> ProbeRows:
    """The golden windows, an engine from its first flight on, spells of every kind and length, conditions' borders."""
    random = np.random.default_rng(0)
    golden = np.array([one.telemetry for one in manifest.golden], np.float32)
    flights, window = golden.reshape(-1, golden.shape[-1]), golden.shape[1]

    def noise(count: int) -> ProbeRows:
        drawn = flights[np.arange(count) % len(flights)]
        return (drawn * (1 + 1e-3 * random.standard_normal(drawn.shape))).astype(np.float32)

    calm = noise(NOISE_ROWS)
    parts = [flights, np.repeat(calm[:1], window - 1, axis=0), calm]
    for how in CORRUPTIONS:
        for length in (*CORRUPTED_ROWS, window + max(CORRUPTED_ROWS)):
            rows = noise(window + length)
            _corrupt(rows[window // 2 :][:length], random.choice([True, False], rows.shape[1]), how, random)
            parts.append(rows)
    if manifest.conditions is not None:
        parts.append(_condition_border(noise(window + max(CORRUPTED_ROWS)), manifest.conditions, random))
    return np.concatenate(parts)


def _condition_border(rows: ProbeRows, conditions: Conditions, random: np.random.Generator) -> ProbeRows:
    """Rows so far from their conditions that the last bit of a sum tells whether they are of them."""
    usual = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
    away = random.standard_normal((len(rows), len(usual.scales)))
    away *= CONDITION_BORDER * usual.scales / np.linalg.norm(away, axis=1, keepdims=True)
    settings = usual.matching_rows(rows)[:, : len(usual.scales)] + away
    return np.concatenate([settings, rows[:, len(usual.scales) :]], axis=1, dtype=np.float32)


def _corrupt(rows: ProbeRows, some: Mask, how: str, random: np.random.Generator) -> None:
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
        rows[:, some] = random.choice(EXTREME_VALUES, (len(rows), some.sum()))
