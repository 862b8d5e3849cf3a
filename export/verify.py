"""Proof that ONNX Runtime answers as torch does; only a proven file becomes the artefact.

    python -m export.verify         # the last step of `make export`

Compared at batches of 1, 2, 7 and 64, and a batch of N against N batches of 1: exporters have frozen recurrent states
and batch sizes without a word. The measured difference goes into the artefact as its tolerance, the torch answers to a
few synthetic windows as its golden windows; no reading of the data set leaves with the file.
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
from model.training.cross_fit import CHECKPOINT, load
from model.training.network import EngineHealth
from model.windows import Readings, overlapping

BATCHES = (1, 2, 7, 64)
GOLDEN_WINDOWS = 4
LIMIT = 1e-4  # logits; more than rounding can explain
# Other processors round otherwise. Ten times what was measured here, and never under 1e-5, is still nothing to a user.
MARGIN, LEAST = 10.0, 1e-5


class VerifyError(Exception):
    """ONNX Runtime does not answer as torch does; the message says where."""


def synthetic_windows(network: EngineHealth, count: int, seed: int = 0) -> Readings:
    """Windows (count, T, 17) drawn from the normaliser's own statistics, wearing at different speeds.

    Every second one is a short history, padded in front. Readings have three decimals, so that they are short to write.
    """
    random, n = np.random.default_rng(seed), network.normalise
    condition = random.integers(0, len(n.centres), (count, network.config.window))
    wear = np.linspace(0, 1, network.config.window)[:, None] * random.normal(0, 2, (count, 1, n.means.shape[1]))
    settings = n.centres.numpy()[condition]
    sensors = n.means.numpy()[condition] + n.deviations.numpy()[condition] * (wear + random.normal(0, 0.5, wear.shape))
    windows = np.round(np.concatenate([settings, sensors], axis=2), 3).astype(np.float32)
    for k in range(1, count, 2):
        begins = random.integers(1, network.config.window)
        windows[k, :begins] = windows[k, begins]
    return windows


def torch_answers(network: torch.nn.Module, windows: Readings) -> tuple[Readings, Readings]:
    """Logits (N, C) and RUL (N,) of the network itself."""
    with torch.inference_mode():
        logits, rul = network.eval()(torch.from_numpy(windows))
    return logits.numpy(), rul.numpy()


def measure(network: torch.nn.Module, session: ort.InferenceSession, windows: Readings) -> float:
    """The largest difference between torch and ONNX Runtime over all batch sizes, in logits; RUL in units of its cap.

    Raises:
        VerifyError: more than 1e-4, an answer that is not finite, or a batch that ONNX Runtime refuses.
    """
    expected, units = torch_answers(network, windows[: max(BATCHES)]), (1.0, float(RUL_CAP))
    worst = 0.0
    for size in BATCHES:
        whole, alone = [np.arange(size)], [np.array([i]) for i in range(size)]
        for what, batches in (("", whole), (" in batches of 1", alone)):
            difference = max_difference(lambda batch: _run(session, batch), windows, expected, batches, units)
            if not difference <= LIMIT:  # also when it is NaN
                raise VerifyError(f"batch {size}{what}: differs from torch by {difference:.3g}, limit {LIMIT:g}")
            worst = max(worst, difference)
    return worst


def vouched(session: ort.InferenceSession, histories: ort.InferenceSession, rows: Readings, window: int) -> float:
    """Share of the windows of rows (M, 17) for which the graph over histories vouches.

    Raises:
        VerifyError: one of those has not the bits that the network gives.
    """
    starts = np.arange(len(rows) - window + 1)
    answers = histories.run(
        [contract.LOGITS, contract.RUL, contract.EXACT], {contract.INPUT: rows, contract.STARTS: starts}
    )
    exact = np.asarray(answers[2])
    for found, own in zip(answers, _run(session, np.ascontiguousarray(overlapping(rows, window))), strict=False):
        if not np.array_equal(np.asarray(found)[exact], own[exact]):
            raise VerifyError("the graph over histories vouches for windows that the network answers otherwise")
    return float(exact.mean())


def check_plan(session: ort.InferenceSession, plan: ort.InferenceSession, windows: Readings) -> None:
    """Whether a plan gives the network's bits for windows (N, T, 17), alone and in company.

    Raises:
        VerifyError: it does not.
    """
    for size in BATCHES:
        for found, own in zip(_run(plan, windows[:size]), _run(session, windows[:size]), strict=True):
            if not np.array_equal(found.view(np.int32), own.view(np.int32)):
                raise VerifyError(f"batch {size}: the plan answers otherwise than the network")


def shortest(values: Readings) -> list[Any]:
    """Nested lists of the shortest decimals that are read back as the same float32."""
    return [float(str(value)) if value.ndim == 0 else shortest(value) for value in values]


def _run(session: ort.InferenceSession, batch: Readings) -> tuple[Readings, Readings]:
    try:
        logits, rul = session.run([contract.LOGITS, contract.RUL], {contract.INPUT: batch})
    except Exception as error:  # ONNX Runtime raises a class of its own for each kind of failure
        raise VerifyError(f"batch {len(batch)}: {str(error).splitlines()[0]}") from None
    if logits.shape[0] != len(batch) or rul.shape != (len(batch),):
        raise VerifyError(f"batch {len(batch)}: answers of shapes {logits.shape} and {rul.shape}")
    return logits, rul


def _beside(session: ort.InferenceSession, key: str) -> ort.InferenceSession | None:
    """A graph that lies in the file beside the network's own, if it is there."""
    graph = contract.graph_beside(session.get_modelmeta().custom_metadata_map, key)
    return None if graph is None else ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def main() -> None:
    """build/unverified.onnx and its checkpoint, to the artefact."""
    parser = argparse.ArgumentParser(description="Verify an exported file against its checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--input", type=Path, default=UNVERIFIED)
    parser.add_argument("--output", type=Path, default=ARTEFACT)
    flags = parser.parse_args()
    try:
        network, checkpoint = load(flags.checkpoint)
        session, manifest = open_artefact(flags.input)
        inputs = synthetic_windows(network, max(BATCHES))
        measured = measure(network, session, inputs)
        plan, histories = _beside(session, contract.PLAN_KEY), _beside(session, contract.HISTORIES_KEY)
        if plan is not None:
            check_plan(session, plan, inputs)
        rows = inputs.reshape(-1, inputs.shape[-1])
        share = 0.0 if histories is None else vouched(session, histories, rows, inputs.shape[1])
    except (VerifyError, ContractError, DataError) as error:
        raise SystemExit(f"verify: {error}") from None
    windows = synthetic_windows(network, GOLDEN_WINDOWS, seed=1)
    logits, rul = torch_answers(network, windows)
    golden = tuple(
        Golden(telemetry=shortest(window), logits=row.tolist(), rul=float(cycles))
        for window, row, cycles in zip(windows, logits, rul, strict=True)
    )
    proven = manifest.model_copy(update={"golden": golden, "tolerance": max(MARGIN * measured, LEAST)})
    digest = contract.write(flags.input.read_bytes(), proven, flags.output)
    weights = flags.output.with_suffix(".pt")  # the same network for who wants to train on, or to check this proof
    torch.save({"network": checkpoint["network"], "weights": checkpoint["weights"]}, weights)
    print(f"work is shared between {share:.0%} of overlapping windows, to the same bits")
    print(f"torch and ONNX Runtime differ by {measured:.2g} at most; tolerance {proven.tolerance:.2g}")
    print(f"wrote {flags.output}: {flags.output.stat().st_size / 1024:.0f} KiB, sha256 {digest}")


if __name__ == "__main__":
    main()
