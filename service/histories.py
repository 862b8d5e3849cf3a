"""An artefact's second graph: its answers for windows that overlap, with what they share worked out once.

The graph lies in the file's metadata and is no second opinion: it is used only if it gives the bits of the network,
which it proves when it is opened, on this machine. Windows that it does not vouch for are left to the network.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model import contract
from service import runtime
from service.errors import ArtefactRejected
from service.runtime import Batch, Model, Outputs

Starts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
SIZES = (1, 7, 64, 4096)  # windows of a call that proves the graph
SPELLS = 40  # rows that repeat the one before them, wholly or in some channels, in the history that proves it


@dataclass(frozen=True)
class Histories:
    """A proven graph over rows of engines that lie one behind another."""

    model: Model
    session: ort.InferenceSession

    @property
    def window(self) -> int:
        """Rows of a window."""
        return self.model.manifest.window or 1

    def run(self, rows: Batch, starts: Starts) -> tuple[Outputs, Mask]:
        """Answers of the windows that begin at `starts` (N,) in rows (M, C), and which are the network's own (N,)."""
        names = [contract.LOGITS, contract.RUL, contract.EXACT]
        logits, rul, exact = self.session.run(names, {contract.INPUT: rows, contract.STARTS: starts})
        return Outputs(logits, rul), exact

    def answers(self, rows: Batch, starts: Starts, most: int) -> Outputs:
        """The same, each window that the graph does not vouch for run by the network, at most so many at once."""
        found, exact = self.run(rows, starts)
        windows, alone = views(rows, self.model), np.flatnonzero(~exact)
        for i in range(0, len(alone), most):
            which = alone[i : i + most]
            for column, own in zip(found, self.model.run(np.ascontiguousarray(windows[starts[which]])), strict=True):
                if column is not None:
                    column[which] = own
        return found


def open_histories(path: Path, model: Model) -> Histories | None:
    """The second graph of an open model's file; None if it has none, or one that answers otherwise than the network.

    Raises:
        ArtefactRejected: the file is not the one that was opened.
    """
    content = path.read_bytes()
    if contract.digest(content) != model.digest:
        raise ArtefactRejected(f"{path}: changed while it was opened")
    text = runtime.metadata(content).get(contract.HISTORIES_KEY)
    if text is None or model.manifest.window is None or model.manifest.rul_thresholds is None:
        return None
    try:
        found = Histories(model, runtime.session(base64.b64decode(text, validate=True), 1))
        return found if _proven(found) else None
    except Exception:  # each way in which a graph can fail has a class of its own, and here all mean: it is of no use
        return None


def views(rows: Batch, model: Model) -> Batch:
    """Every window of rows (M, C) that lie one behind another, (M - window + 1, window, C), without a copy."""
    window = model.manifest.window or 1
    if len(rows) < window:
        return np.empty((0, window, rows.shape[1]), np.float32)
    return np.lib.stride_tricks.sliding_window_view(rows, window, axis=0).transpose(0, 2, 1)


def _proven(found: Histories) -> bool:
    """Whether the graph has the network's bits, in calls of several sizes, and vouches for a quarter of the windows."""
    rows = _history(found.model)
    windows = views(rows, found.model)
    for size in SIZES:
        for starts in _cuts(len(windows), size):
            (logits, rul), exact = found.run(rows[starts[0] : starts[-1] + windows.shape[1]], starts - starts[0])
            own = found.model.run(np.ascontiguousarray(windows[starts]))
            same = _bits(logits) == _bits(own.logits)
            if rul is not None and own.rul is not None:
                same = np.column_stack([same, _bits(rul) == _bits(own.rul)])
            if not same[exact].all() or (size == max(SIZES) and 4 * exact.sum() < len(exact)):
                return False
    return True


def _cuts(count: int, size: int) -> Iterator[Starts]:
    """A few calls of so many windows, from all over the history."""
    for begin in np.unique(np.linspace(0, max(count - size, 0), 8).astype(np.int64)).tolist():
        yield np.arange(begin, min(begin + size, count))


def _bits(values: Batch) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values).view(np.int32)


def _history(model: Model) -> Batch:
    """The golden windows and noise about them, with spells in which readings, or whole rows, are repeated."""
    random = np.random.default_rng(0)
    golden = np.array([one.telemetry for one in model.manifest.golden], np.float32)
    noise = golden * (1 + 1e-3 * random.standard_normal(golden.shape))
    rows = np.concatenate([*golden, *noise.astype(np.float32)])
    for spell in range(SPELLS):
        begin, length = int(random.integers(len(rows) - 8)), int(random.integers(1, 8))
        channels = slice(None) if spell % 8 == 0 else random.integers(rows.shape[1], size=2)
        rows[begin : begin + length, channels] = rows[begin, channels]
    return rows
