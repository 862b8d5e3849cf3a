"""Flights that verify the other graphs of an artefact: every kind of row for which their outputs might differ."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import Conditions, Manifest
from model.evaluation.occlusion import ConditionBaselines
from model.windows import overlapping

ProbeRows = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
NOISE_ROWS = 2**10  # noisy rows among the flights
CORRUPTIONS = ("held", "coarse", "copied", "scaled", "odd")  # of consecutive rows
CORRUPTED_ROWS = (3, 4, 5, 8)  # rows with the same corruption; another run per kind is longer than a window
EXTREME_VALUES = (0.0, -0.0, 1e-40, 3e38, -3e38)  # readings that no working sensor gives
CONDITION_BORDER = 0.5  # setting scales from a condition's centre; beyond it, a row has no condition
BATCH_SIZES = (1, 1, 1, 1, 7, 7, 64, 64, 64)  # windows of the batches that verify a graph with a dynamic batch


def probe_batches(manifest: Manifest) -> Iterator[ProbeRows]:
    """Yield batches (N, window, channels) of windows from all parts of the flights."""
    windows = overlapping(probe_history(manifest), manifest.window or 1)
    chosen = np.linspace(0, len(windows) - 1, sum(BATCH_SIZES)).astype(np.int64)
    for indices in np.split(np.random.default_rng(0).permutation(chosen), np.cumsum(BATCH_SIZES)[:-1]):
        yield np.ascontiguousarray(windows[indices])


def bit_patterns(outputs: Iterable[ProbeRows | None]) -> npt.NDArray[Any]:
    """Return the bits of outputs (N, classes + 1) as integers."""
    return np.column_stack([column.view(np.int32) for column in outputs if column is not None])


def probe_history(manifest: Manifest) -> ProbeRows:
    """Return golden windows, an engine from its first flight, corrupted runs, and rows at the border of a condition."""
    random = np.random.default_rng(0)
    golden = np.array([instance.telemetry for instance in manifest.golden], np.float32)
    flights, window = golden.reshape(-1, golden.shape[-1]), golden.shape[1]

    def noise(count: int) -> ProbeRows:
        drawn = flights[np.arange(count) % len(flights)]
        return (drawn * (1 + 1e-3 * random.standard_normal(drawn.shape))).astype(np.float32)

    calm = noise(NOISE_ROWS)
    parts = [flights, np.repeat(calm[:1], window - 1, axis=0), calm]
    for kind in CORRUPTIONS:
        for length in (*CORRUPTED_ROWS, window + max(CORRUPTED_ROWS)):
            rows = noise(window + length)
            _corrupt(rows[window // 2 :][:length], random.choice([True, False], rows.shape[1]), kind, random)
            parts.append(rows)
    if manifest.conditions is not None:
        parts.append(_condition_border(noise(window + max(CORRUPTED_ROWS)), manifest.conditions, random))
    return np.concatenate(parts)


def _condition_border(rows: ProbeRows, conditions: Conditions, random: np.random.Generator) -> ProbeRows:
    """Move rows to the border of their conditions, where the last bit of a sum decides whether they belong to them."""
    baselines = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
    offset = random.standard_normal((len(rows), len(baselines.scales)))
    offset *= CONDITION_BORDER * baselines.scales / np.linalg.norm(offset, axis=1, keepdims=True)
    settings = baselines.matching_rows(rows)[:, : len(baselines.scales)] + offset
    return np.concatenate([settings, rows[:, len(baselines.scales) :]], axis=1, dtype=np.float32)


def _corrupt(rows: ProbeRows, channels: Mask, kind: str, random: np.random.Generator) -> None:
    """Apply one kind of corruption to the selected channels (C,), in place."""
    if kind == "held":
        rows[:, channels] = rows[0, channels]
    elif kind == "coarse":  # three of four readings repeat the previous one
        for row, before in zip(rows[1:], rows, strict=False):
            np.copyto(row, before, where=channels & (random.random(len(channels)) < 0.75))
    elif kind == "copied":
        rows[:] = rows[0]
    elif kind == "scaled":  # by a factor between 1.0001 and 2
        rows[:, channels] *= (1 + 10 ** random.uniform(-4, 0, channels.sum())).astype(np.float32)
    elif kind == "odd":
        rows[:, channels] = random.choice(EXTREME_VALUES, (len(rows), channels.sum()))
