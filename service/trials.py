"""Flights that prove a graph beside the network's own: every kind of row that the two might see otherwise."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import Manifest
from model.windows import overlapping

Rows = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
CALM = 2**10  # rows of noise in the flights that prove a graph
KINDS = ("held", "coarse", "copied", "scaled", "odd")  # of spells in them
SPELLS = (3, 4, 5, 8)  # rows of a spell; one of each kind is longer than a window
ODD = (0.0, -0.0, 1e-40, 3e38, -3e38)  # readings that no healthy sensor gives
SIZES = (1, 1, 1, 1, 7, 7, 64, 64, 64)  # windows of the batches that prove a graph which answers any batch


def batches(manifest: Manifest) -> Iterator[Rows]:
    """Rowses of windows from all over the flights."""
    windows = overlapping(flown(manifest), manifest.window or 1)
    chosen = np.linspace(0, len(windows) - 1, sum(SIZES)).astype(np.int64)
    for some in np.split(np.random.default_rng(0).permutation(chosen), np.cumsum(SIZES)[:-1]):
        yield np.ascontiguousarray(windows[some])


def bits(outputs: Iterable[Rows | None]) -> npt.NDArray[Any]:
    """Answers (N, classes + 1) as they are written."""
    return np.column_stack([column.view(np.int32) for column in outputs if column is not None])


def flown(manifest: Manifest) -> Rows:
    """The golden windows, an engine from its first flight on, and spells of every kind and length."""
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
    return np.concatenate(parts)


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
