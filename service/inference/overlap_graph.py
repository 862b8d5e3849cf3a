"""An artefact's second graph: its answers for windows that overlap, with what they share worked out once.

The graph lies in the file's metadata and is no second opinion: it is used only if it gives the bits of the network,
which it proves when it is opened, on this machine. Windows that it does not vouch for are left to the network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model import contract
from model.windows import overlapping
from service.errors import ArtefactRejected
from service.inference import onnx_model, probe_windows
from service.inference.onnx_model import Batch, Model, Outputs
from service.inference.probe_windows import bit_patterns

WindowStarts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
VERIFIED_SIZES = (1, 7, 64)  # windows of a call that proves the graph, beside one of LARGE
MAX_CALL_ROWS = 2**14  # rows of the largest call that is proven; of larger ones nothing is known
MAX_OVERLAP_WINDOWS = 2**10  # windows of the same


@dataclass(frozen=True)
class OverlapGraph:
    """A proven graph over rows of engines that lie one behind another."""

    model: Model
    session: ort.InferenceSession

    @property
    def window(self) -> int:
        """Rows of a window."""
        return self.model.manifest.window or 1

    def run(self, rows: Batch, starts: WindowStarts) -> tuple[Outputs, Mask]:
        """Answers of the windows that begin at `starts` (N,) in rows (M, C), and which are the network's own (N,).

        Raises:
            Exception: the graph fails on these rows, in one of ONNX Runtime's ways, or its answers are no answers.
        """
        names = [contract.LOGITS, contract.RUL, contract.EXACT]
        logits, rul, exact = self.session.run(names, {contract.INPUT: rows, contract.STARTS: starts})
        n, classes = len(starts), len(self.model.manifest.classes)
        found = [(column.shape, column.dtype) for column in (logits, rul, exact)]
        if found != [((n, classes), np.float32), ((n,), np.float32), ((n,), np.bool_)]:
            raise ValueError(f"answers of other shapes or types: {found}")
        return Outputs(logits, rul), exact

    def answers(self, rows: Batch, starts: WindowStarts, most: int) -> Outputs:
        """The same, each window that the graph does not vouch for run by the network, at most so many at once."""
        try:
            found, exact = self.run(rows, starts)
        except Exception:  # a class of its own for each way in which it can fail; the network does without
            return _run_network(self.model, rows, starts, most)
        which = np.flatnonzero(~exact)
        if len(which):
            for column, own in zip(found, _run_network(self.model, rows, starts[which], most), strict=True):
                if column is not None:
                    column[which] = own
        return found


def open_overlap_graph(path: Path, model: Model) -> OverlapGraph | None:
    """The second graph of an open model's file; None if it has none, or one that answers otherwise than the network.

    Raises:
        ArtefactRejected: the file is not the one that was opened.
    """
    content = path.read_bytes()
    if contract.digest(content) != model.digest:
        raise ArtefactRejected(f"{path}: changed while it was opened")
    if model.manifest.window is None or model.manifest.rul_thresholds is None:
        return None
    try:
        graph = contract.graph_beside(onnx_model.read_metadata(content), contract.HISTORIES_KEY)
        if graph is None:
            return None
        found = OverlapGraph(model, onnx_model.open_session(graph, 1))
        return found if _matches_network(found) else None
    except Exception:  # each way in which a graph can fail has a class of its own, and here all mean: it is of no use
        return None


def _run_network(model: Model, rows: Batch, starts: WindowStarts, most: int) -> Outputs:
    """The network's answers for windows that begin at `starts`, at most so many at once."""
    windows = overlapping(rows, model.manifest.window or 1)
    cuts = range(0, len(starts), most)
    return onnx_model.concatenate_outputs(
        [model.run(np.ascontiguousarray(windows[starts[i : i + most]])) for i in cuts]
    )


def _matches_network(found: OverlapGraph) -> bool:
    """Whether the graph has the network's bits wherever it vouches, for a quarter of the windows and more.

    The network's are those of its usual batches. It must have them in small ones too: on a processor that rounds by the
    size of a batch, nothing that is put together in another way can give the same.
    """
    rows, window = probe_windows.probe_history(found.model.manifest), found.window
    every = np.arange(len(rows) - window + 1)
    own = bit_patterns(_run_network(found.model, rows, every, max(VERIFIED_SIZES)))
    for starts in (part for size in VERIFIED_SIZES for part in _sample_calls(len(every), size)):
        alone = bit_patterns(_run_network(found.model, rows, starts, len(starts)))
        some, exact = found.run(rows[starts[0] : starts[-1] + window], starts - starts[0])
        if not (np.array_equal(alone, own[starts]) and np.array_equal(bit_patterns(some)[exact], own[starts][exact])):
            return False
    whole, vouched = found.run(rows, every)
    copies = -(-MAX_CALL_ROWS // len(rows))
    drawn = np.sort(np.random.default_rng(0).permutation(copies * len(every))[:MAX_OVERLAP_WINDOWS])
    copy, starts = np.divmod(drawn, len(every))
    large, exact = found.run(np.tile(rows, (copies, 1)), copy * len(rows) + starts)
    same = np.array_equal(bit_patterns(whole)[vouched], own[vouched])
    same = same and np.array_equal(bit_patterns(large)[exact], own[starts][exact])
    return same and bool(4 * vouched.sum() >= len(vouched) and 4 * exact.sum() >= len(exact))


def _sample_calls(count: int, size: int) -> Iterator[WindowStarts]:
    """A few calls of so many windows, from all over the history."""
    for begin in np.unique(np.linspace(0, max(count - size, 0), 8).astype(np.int64)).tolist():
        yield np.arange(begin, min(begin + size, count))
