"""Verify an opened model: golden windows, batch invariance, channel-major graph, warm-up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model import contract
from model.batch_invariance import max_difference, run_alone
from model.contract import ContractError
from service.inference import probe_windows
from service.inference.onnx_model import Batch, Model, Outputs, build_runner, open_session, run_singly
from service.inference.probe_windows import bit_patterns

PROBE_WINDOWS = 3  # random windows that verify a batch, in addition to the golden ones
ROWS_BELOW_BUCKET = (0, 1, 3)  # rows fewer than a bucket: kernels compute remainders differently
RUL_UNITS = 100  # cycles are a hundred times as large as logits, and so is their rounding


def check_golden_windows(model: Model) -> None:
    """Compare the outputs for the golden windows with those in the manifest, and check batch invariance.

    Raises:
        ContractError: an output differs by more than the tolerance, or has another shape or type.
    """
    golden = model.manifest.golden
    try:
        windows = np.array([g.telemetry for g in golden], dtype=np.float32).reshape(len(golden), *model.input_shape)
        logits = np.array([g.logits for g in golden], dtype=np.float64).reshape(
            len(golden), len(model.manifest.classes)
        )
    except (ValueError, TypeError, OverflowError):
        raise ContractError("golden windows do not have the model's shapes") from None
    outputs = _check_batch_invariance(model, np.concatenate([windows, _random_windows(model, windows)]))
    if golden:
        _compare("golden window", outputs.logits[: len(golden)], logits, model.manifest.tolerance)
    if outputs.rul is not None and golden and all(g.rul is not None for g in golden):
        rul = np.array([g.rul for g in golden])
        _compare("golden window's RUL", outputs.rul[: len(golden)], rul, RUL_UNITS * model.manifest.tolerance)


def use_channel_major_graph(model: Model, session: ort.InferenceSession, threads: int) -> Model:
    """Return the model with the channel-major graph of its file if that has the network's bits here; else unchanged."""
    try:
        graph = contract.read_graph(session.get_modelmeta().custom_metadata_map, contract.CHANNEL_MAJOR_KEY)
        if graph is None or not model.manifest.golden:
            return model
        run = build_runner(open_session(graph, threads), model.manifest)
        same = all(
            np.array_equal(bit_patterns(run(batch)), bit_patterns(model.run(batch)))
            for batch in probe_windows.probe_batches(model.manifest)
        )
    except Exception:  # a separate class per kind of failure; a graph that fails is not used
        return model
    return replace(model, run=run, optimised_graph=True) if same else model


def warm_up(model: Model, batch_rows: int, deterministic: bool) -> Model:
    """Run every bucket at least once, and measure how far predictions in a batch differ from those of one row."""
    golden = np.array([g.telemetry for g in model.manifest.golden], dtype=np.float32)
    golden = golden.reshape(len(golden), *model.input_shape)
    probes = np.concatenate([golden, _random_windows(model, golden)])
    sizes = sorted({1 << k for k in range(batch_rows.bit_length()) if 1 << k <= batch_rows} | {batch_rows})
    batches = [
        (np.arange(size - fewer) + fewer) % len(probes) for size in sizes for fewer in ROWS_BELOW_BUCKET if fewer < size
    ]
    run = _present_outputs(model.run)
    difference = max_difference(run, probes, run_alone(run, probes), batches, _tolerance_units(model))
    if not deterministic:
        return replace(model, batch_max_difference=difference)
    return replace(model, run=run_singly(model.run), batch_max_difference=0.0)


def _present_outputs(run: Callable[[Batch], Outputs]) -> Callable[[Batch], list[Batch]]:
    """Return a function that returns the outputs without an absent RUL."""
    return lambda batch: [column for column in run(batch) if column is not None]


def _random_windows(model: Model, golden: Batch) -> Batch:
    """Return distinct windows: a graph that mixes rows of a batch has other outputs for them than for each alone."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((PROBE_WINDOWS, *model.input_shape))
    base = golden[np.arange(PROBE_WINDOWS) % len(golden)] if len(golden) else np.zeros_like(noise)
    return (base + noise * np.maximum(np.abs(base) * 1e-3, 1.0 if not len(golden) else 0.0)).astype(np.float32)


def _check_batch_invariance(model: Model, windows: Batch) -> Outputs:
    """Return the outputs for some windows in one batch, after comparing them with those of batches of one."""
    run = _present_outputs(model.run)
    try:
        outputs = model.run(windows)
        alone = run_alone(run, windows)
    except Exception as error:  # ONNX Runtime has a separate exception class per kind of failure
        raise ContractError(f"the network fails on the golden windows: {str(error).splitlines()[0]}") from None
    for name, output, shape in (
        ("logits", outputs.logits, (len(windows), len(model.manifest.classes))),
        ("rul", outputs.rul, (len(windows),)),
    ):
        if output is not None and (
            output.shape != shape or output.dtype != np.float32 or not np.isfinite(output).all()
        ):
            raise ContractError(f"output {name!r} is not finite float32 of shape {list(shape)} for the golden windows")
    names = ("batch of N against N batches of 1", "batch of N against N batches of 1, RUL")
    columns = [column for column in outputs if column is not None]
    for name, column, own, unit in zip(names, columns, alone, _tolerance_units(model), strict=False):
        _compare(name, column, own, unit * model.manifest.tolerance)
    return outputs


def _tolerance_units(model: Model) -> tuple[float, ...]:
    """Return the unit in which a difference of each output is compared with the tolerance."""
    return (1.0,) if model.manifest.rul_thresholds is None else (1.0, float(RUL_UNITS))


def _compare(name: str, actual: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float) -> None:
    if actual.shape != expected.shape:
        raise ContractError(f"{name}: outputs of shape {list(actual.shape)}, not {list(expected.shape)}")
    difference = float(np.max(np.abs(actual.astype(np.float64) - expected)))
    if not difference <= tolerance:  # also when it is NaN
        raise ContractError(f"{name}: outputs differ by {difference:.3g}, the tolerance is {tolerance:.3g}")
