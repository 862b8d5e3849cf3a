"""Verify that outputs of ONNX Runtime equal those of torch, and write the verified file as the artefact.

    python -m export.verify         # the last step of `make export`

Compares batches of 1, 2, 7 and 64, and a batch of N with N batches of 1. Exporters may fix recurrent states and batch
sizes without a warning. The measured difference determines the tolerance in the artefact. The torch outputs of
some synthetic windows become its golden windows. The artefact contains no rows of the data set.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from export.to_onnx import UNVERIFIED
from model import contract
from model.batch_invariance import max_difference
from model.contract import RUL_CAP, ContractError, Golden
from model.data.cmapss import DataError
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.training.cross_fit import CHECKPOINT, load_checkpoint
from model.training.network import EngineHealth
from model.windows import Readings, overlapping

BATCHES = (1, 2, 7, 64)
GOLDEN_WINDOWS = 4
MAX_DIFFERENCE = 1e-4  # of logits; more than rounding errors
# Processors round differently: the tolerance is 10 times the measured difference and at least 1e-5.
TOLERANCE_FACTOR, MIN_TOLERANCE = 10.0, 1e-5


class VerifyError(Exception):
    """Outputs of ONNX Runtime and torch differ. The message states where."""


def synthetic_windows(network: EngineHealth, count: int, seed: int = 0) -> Readings:
    """Return windows (count, T, 17) drawn from the statistics of the normaliser, with different wear.

    Every second window is a short history with padding in front. Readings have three decimals for a small manifest.
    """
    random, n = np.random.default_rng(seed), network.normalise
    condition = random.integers(0, len(n.centres), (count, network.config.window))
    wear = np.linspace(0, 1, network.config.window)[:, None] * random.normal(0, 2, (count, 1, n.means.shape[1]))
    settings = n.centres.numpy()[condition]
    sensors = n.means.numpy()[condition] + n.deviations.numpy()[condition] * (wear + random.normal(0, 0.5, wear.shape))
    windows = np.round(np.concatenate([settings, sensors], axis=2), 3).astype(np.float32)
    for k in range(1, count, 2):
        first = random.integers(1, network.config.window)
        windows[k, :first] = windows[k, first]
    return windows


def run_torch(network: torch.nn.Module, windows: Readings) -> tuple[Readings, Readings]:
    """Return logits (N, C) and RUL (N,) of the network in torch."""
    with torch.inference_mode():
        logits, rul = network.eval()(torch.from_numpy(windows))
    return logits.numpy(), rul.numpy()


def measure_difference(network: torch.nn.Module, session: ort.InferenceSession, windows: Readings) -> float:
    """Return the largest difference between torch and ONNX Runtime, in logits and in RUL divided by its cap.

    Raises:
        VerifyError: the difference exceeds 1e-4, an output is not finite, or ONNX Runtime rejects a batch.
    """
    expected, units = run_torch(network, windows[: max(BATCHES)]), (1.0, float(RUL_CAP))
    worst = 0.0
    for size in BATCHES:
        whole, singles = [np.arange(size)], [np.array([i]) for i in range(size)]
        for suffix, batches in (("", whole), (" in batches of 1", singles)):
            difference = max_difference(lambda batch: _run_session(session, batch), windows, expected, batches, units)
            if not difference <= MAX_DIFFERENCE:  # also when it is NaN
                raise VerifyError(
                    f"batch {size}{suffix}: differs from torch by {difference:.3g}, limit {MAX_DIFFERENCE:g}"
                )
            worst = max(worst, difference)
    return worst


def verify_overlap_graph(
    session: ort.InferenceSession, overlap: ort.InferenceSession, rows: Readings, window: int
) -> float:
    """Return the share of windows of rows (M, 17) that the overlap graph reports as exact.

    Raises:
        VerifyError: an exact window has other output bits than the network.
    """
    starts = np.arange(len(rows) - window + 1)
    outputs = overlap.run(
        [contract.LOGITS, contract.RUL, contract.EXACT], {contract.INPUT: rows, contract.STARTS: starts}
    )
    exact = np.asarray(outputs[2])
    for output, expected in zip(
        outputs, _run_session(session, np.ascontiguousarray(overlapping(rows, window))), strict=False
    ):
        if not np.array_equal(np.asarray(output)[exact], expected[exact]):
            raise VerifyError("outputs of the overlap graph differ from the network for windows reported as exact")
    return float(exact.mean())


def verify_channel_major(session: ort.InferenceSession, channel_major: ort.InferenceSession, windows: Readings) -> None:
    """Check that the channel-major graph has the same output bits as the network for windows (N, T, 17).

    Raises:
        VerifyError: outputs differ for a batch size.
    """
    for size in BATCHES:
        for output, expected in zip(
            _run_session(channel_major, windows[:size]), _run_session(session, windows[:size]), strict=True
        ):
            if not np.array_equal(output.view(np.int32), expected.view(np.int32)):
                raise VerifyError(f"batch {size}: outputs of the channel-major graph differ from the network")


def shortest_decimals(values: Readings) -> list[Any]:
    """Return nested lists of the shortest decimals that convert back to the same float32."""
    return [float(str(value)) if value.ndim == 0 else shortest_decimals(value) for value in values]


def _run_session(session: ort.InferenceSession, batch: Readings) -> tuple[Readings, Readings]:
    try:
        logits, rul = session.run([contract.LOGITS, contract.RUL], {contract.INPUT: batch})
    except Exception as error:  # ONNX Runtime has a separate exception class per kind of failure
        raise VerifyError(f"batch {len(batch)}: {str(error).splitlines()[0]}") from None
    if logits.shape[0] != len(batch) or rul.shape != (len(batch),):
        raise VerifyError(f"batch {len(batch)}: outputs of shapes {logits.shape} and {rul.shape}")
    return logits, rul


def _open_graph(session: ort.InferenceSession, key: str) -> ort.InferenceSession | None:
    """Open another graph that is stored in the metadata of the file, if there is one."""
    graph = contract.read_graph(session.get_modelmeta().custom_metadata_map, key)
    return None if graph is None else ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def main() -> None:
    """Verify build/unverified.onnx against its checkpoint and write the artefact."""
    parser = argparse.ArgumentParser(description="Verify an exported file against its checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--input", type=Path, default=UNVERIFIED)
    parser.add_argument("--output", type=Path, default=ARTEFACT)
    flags = parser.parse_args()
    try:
        network, checkpoint = load_checkpoint(flags.checkpoint)
        session, manifest = open_artefact(flags.input)
        inputs = synthetic_windows(network, max(BATCHES))
        measured = measure_difference(network, session, inputs)
        channel_major, overlap = (
            _open_graph(session, contract.CHANNEL_MAJOR_KEY),
            _open_graph(session, contract.OVERLAP_KEY),
        )
        if channel_major is not None:
            verify_channel_major(session, channel_major, inputs)
        rows = inputs.reshape(-1, inputs.shape[-1])
        share = 0.0 if overlap is None else verify_overlap_graph(session, overlap, rows, inputs.shape[1])
    except (VerifyError, ContractError, DataError) as error:
        raise SystemExit(f"verify: {error}") from None
    windows = synthetic_windows(network, GOLDEN_WINDOWS, seed=1)
    logits, rul = run_torch(network, windows)
    golden = tuple(
        Golden(telemetry=shortest_decimals(window), logits=row.tolist(), rul=float(cycles))
        for window, row, cycles in zip(windows, logits, rul, strict=True)
    )
    complete = manifest.model_copy(
        update={"golden": golden, "tolerance": max(TOLERANCE_FACTOR * measured, MIN_TOLERANCE)}
    )
    digest = contract.write(flags.input.read_bytes(), complete, flags.output)
    weights = flags.output.with_suffix(".pt")  # the weights for further training and for this verification
    torch.save({"network": checkpoint["network"], "weights": checkpoint["weights"]}, weights)
    print(f"the overlap graph is exact for {share:.0%} of overlapping windows")
    print(f"torch and ONNX Runtime differ by at most {measured:.2g}; tolerance {complete.tolerance:.2g}")
    print(f"wrote {flags.output}: {flags.output.stat().st_size / 1024:.0f} KiB, sha256 {digest}")


if __name__ == "__main__":
    main()
