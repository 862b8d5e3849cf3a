"""Run the overlap graph of an artefact, which computes the shared parts of overlapping windows once.

The graph is stored in the metadata of the file. It is used only if it gives the same bits as the network, which is
verified on this machine when it is opened. The network runs the windows that the graph does not report as exact.
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
VERIFIED_SIZES = (1, 7, 64)  # windows of the calls that verify the graph, in addition to one large call
MAX_CALL_ROWS = 2**14  # rows of the largest call that is verified
MAX_OVERLAP_WINDOWS = 2**10  # windows of that call


@dataclass(frozen=True)
class OverlapGraph:
    """A verified graph over the concatenated rows of engines."""

    model: Model
    session: ort.InferenceSession

    @property
    def window(self) -> int:
        """Number of rows of a window."""
        return self.model.manifest.window or 1

    def run(self, rows: Batch, starts: WindowStarts) -> tuple[Outputs, Mask]:
        """Return outputs of the windows that begin at `starts` (N,) in rows (M, C), and which of them are exact (N,).

        Exact outputs have the same bits as those of the network.

        Raises:
            Exception: the graph fails on these rows, with any class of ONNX Runtime, or its outputs have a wrong shape.
        """
        names = [contract.LOGITS, contract.RUL, contract.EXACT]
        logits, rul, exact = self.session.run(names, {contract.INPUT: rows, contract.STARTS: starts})
        n, classes = len(starts), len(self.model.manifest.classes)
        signature = [(column.shape, column.dtype) for column in (logits, rul, exact)]
        if signature != [((n, classes), np.float32), ((n,), np.float32), ((n,), np.bool_)]:
            raise ValueError(f"outputs of other shapes or types: {signature}")
        return Outputs(logits, rul), exact

    def answers(self, rows: Batch, starts: WindowStarts, max_batch: int) -> Outputs:
        """Return the outputs; the network runs windows that are not exact, at most `max_batch` in one batch."""
        try:
            outputs, exact = self.run(rows, starts)
        except Exception:  # a separate class per kind of failure; the network does not need this graph
            return _run_network(self.model, rows, starts, max_batch)
        inexact = np.flatnonzero(~exact)
        if len(inexact):
            for column, own in zip(outputs, _run_network(self.model, rows, starts[inexact], max_batch), strict=True):
                if column is not None:
                    column[inexact] = own
        return outputs


def open_overlap_graph(path: Path, model: Model) -> OverlapGraph | None:
    """Open the overlap graph of a model's file; None if it has none, or one whose outputs differ from the network's.

    Raises:
        ArtefactRejected: the file is not the one that the model was opened from.
    """
    content = path.read_bytes()
    if contract.digest(content) != model.digest:
        raise ArtefactRejected(f"{path}: the file changed while it was opened")
    if model.manifest.window is None or model.manifest.rul_thresholds is None:
        return None
    try:
        graph = contract.read_graph(onnx_model.read_metadata(content), contract.OVERLAP_KEY)
        if graph is None:
            return None
        overlap_graph = OverlapGraph(model, onnx_model.open_session(graph, 1))
        return overlap_graph if _matches_network(overlap_graph) else None
    except Exception:  # a separate class per kind of failure; a graph that fails is not used
        return None


def _run_network(model: Model, rows: Batch, starts: WindowStarts, max_batch: int) -> Outputs:
    """Return the network's outputs for windows that begin at `starts`, at most `max_batch` in one batch."""
    windows = overlapping(rows, model.manifest.window or 1)
    cuts = range(0, len(starts), max_batch)
    return onnx_model.concatenate_outputs(
        [model.run(np.ascontiguousarray(windows[starts[i : i + max_batch]])) for i in cuts]
    )


def _matches_network(graph: OverlapGraph) -> bool:
    """Return whether exact windows have the network's bits, and at least a quarter of the windows is exact.

    The network's bits are those of its usual batches. They must not differ in small batches: on a processor whose
    rounding depends on the size of a batch, the graph cannot give the same bits.
    """
    rows, window = probe_windows.probe_history(graph.model.manifest), graph.window
    all_starts = np.arange(len(rows) - window + 1)
    own = bit_patterns(_run_network(graph.model, rows, all_starts, max(VERIFIED_SIZES)))
    for starts in (part for size in VERIFIED_SIZES for part in _sample_calls(len(all_starts), size)):
        batched = bit_patterns(_run_network(graph.model, rows, starts, len(starts)))
        outputs, exact = graph.run(rows[starts[0] : starts[-1] + window], starts - starts[0])
        if not (
            np.array_equal(batched, own[starts]) and np.array_equal(bit_patterns(outputs)[exact], own[starts][exact])
        ):
            return False
    whole, whole_exact = graph.run(rows, all_starts)
    copies = -(-MAX_CALL_ROWS // len(rows))
    drawn = np.sort(np.random.default_rng(0).permutation(copies * len(all_starts))[:MAX_OVERLAP_WINDOWS])
    copy, starts = np.divmod(drawn, len(all_starts))
    large, exact = graph.run(np.tile(rows, (copies, 1)), copy * len(rows) + starts)
    same = np.array_equal(bit_patterns(whole)[whole_exact], own[whole_exact])
    same = same and np.array_equal(bit_patterns(large)[exact], own[starts][exact])
    return same and bool(4 * whole_exact.sum() >= len(whole_exact) and 4 * exact.sum() >= len(exact))


def _sample_calls(count: int, size: int) -> Iterator[WindowStarts]:
    """Yield the starts of up to eight calls of `size` windows, spread over the history."""
    for begin in np.unique(np.linspace(0, max(count - size, 0), 8).astype(np.int64)).tolist():
        yield np.arange(begin, min(begin + size, count))
