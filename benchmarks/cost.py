"""Speed and quality of an artefact and of cheaper forms: fp32, graph optimised offline, static int8.

    python -m benchmarks.cost [artefact]       # 3 min on one core; needs C-MAPSS

The process is pinned to one core. Forms alternate, so that other load on the machine affects all of them; results are
medians. int8 is ONNX Runtime's static quantisation, calibrated on training windows of every subset.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from model import contract
from model.data import cmapss
from model.evaluation.evaluate import (
    ARTEFACT,
    format_cells,
    format_header,
    onnx_runner,
    open_artefact,
    predict_test_engines,
)
from model.evaluation.evaluation_metrics import class_metrics, concatenate_rows, rul_metrics
from model.windows import Readings, every_window

BATCHES = (1, 16, 32, 64, 128, 256)
ROUNDS = 41
CALIBRATION_WINDOWS = 512
COLUMNS = {"cross-entropy": 4, "macro-F1": 4, "ECE": 4, "RUL RMSE": 2}


class Windows(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime ships no types for it
    """Training windows in batches."""

    def __init__(self, windows: Readings) -> None:
        self._batches = iter(np.array_split(windows, 8))

    def get_next(self) -> dict[str, Readings] | None:
        """Return the next batch, or None after the last one."""
        batch = next(self._batches, None)
        return None if batch is None else {contract.INPUT: batch}


def training_windows(window: int) -> Readings:
    """Return randomly drawn windows of training engines of every subset."""
    random, folder = np.random.default_rng(0), cmapss.data_folder()
    engines = [history for subset in cmapss.SUBSETS for history in cmapss.read_train(folder, subset)]
    picked = random.choice(len(engines), CALIBRATION_WINDOWS)
    windows = [every_window(engines[k].telemetry, window) for k in picked]
    return np.stack([engine_windows[random.integers(len(engine_windows))] for engine_windows in windows])


def plain_options() -> ort.SessionOptions:
    """Return session options with one thread, as for a worker on one core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def forms(artefact: Path, window: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every form of the artefact, written below `folder`."""
    yield "fp32, shipped", artefact
    optimised, options = folder / "optimised.onnx", plain_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimised)
    ort.InferenceSession(artefact.read_bytes(), options, providers=["CPUExecutionProvider"])
    yield "fp32, graph optimised offline", optimised
    bare, prepared, small = (folder / name for name in ("bare.onnx", "prepared.onnx", "int8.onnx"))
    model = onnx.load(artefact)
    del model.metadata_props[:]
    onnx.save(model, bare)
    quant_pre_process(bare, prepared, skip_symbolic_shape=True)
    layers = [node.name for node in onnx.load(prepared).graph.node if node.op_type in ("Gemm", "MatMul")]
    for name, nodes in (("int8, every product", layers), ("int8, the two layers and the head", layers[-3:])):
        quantize_static(
            prepared,
            small,
            Windows(training_windows(window)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            nodes_to_quantize=nodes,
        )
        yield name, small.rename(folder / f"{name}.onnx")


def seconds(session: ort.InferenceSession, windows: Readings) -> float:
    """Return the duration of one call in seconds."""
    started = time.perf_counter()
    session.run(None, {contract.INPUT: windows})
    return time.perf_counter() - started


def speeds(sessions: dict[str, ort.InferenceSession], windows: Readings) -> dict[str, dict[int, float]]:
    """Return the median seconds of one call by form and batch size. Forms alternate."""
    medians: dict[str, dict[int, float]] = {name: {} for name in sessions}
    for batch in BATCHES:
        taken: dict[str, list[float]] = {name: [] for name in sessions}
        batch_windows = np.ascontiguousarray(windows[:batch])
        for _ in range(ROUNDS * (10 if batch == 1 else 1)):
            for name, session in sessions.items():
                taken[name].append(seconds(session, batch_windows))
        for name, times in taken.items():
            medians[name][batch] = float(np.median(times))
    return medians


def table(artefact: Path) -> Iterator[str]:
    """Yield size, speed and quality of each form as lines of Markdown."""
    _, manifest = open_artefact(artefact)
    window, folder = manifest.window or 1, cmapss.data_folder()
    with tempfile.TemporaryDirectory() as scratch:
        paths = dict(forms(artefact, window, Path(scratch)))
        sessions, sizes, loads = {}, {}, {}
        for name, path in paths.items():
            blob, started = path.read_bytes(), time.perf_counter()
            sessions[name] = ort.InferenceSession(blob, plain_options(), providers=["CPUExecutionProvider"])
            loads[name], sizes[name] = time.perf_counter() - started, len(blob)
    medians = speeds(sessions, training_windows(window))
    yield from format_header(
        "form", {"KiB": 0, "load, ms": 0, "one window, µs": 0, "windows/s": 0, "at batch": 0} | COLUMNS
    )
    for name, session in sessions.items():
        rows = concatenate_rows(predict_test_engines(onnx_runner(session), window, folder)["all"], last_only=False)
        rate, batch = max((batch / took, batch) for batch, took in medians[name].items())
        line = class_metrics(rows, manifest.temperature) | rul_metrics(rows)
        yield (
            f"| {name} | {sizes[name] / 1024:.0f} | {loads[name] * 1e3:.0f} | {medians[name][1] * 1e6:.0f} "
            f"| {rate:.0f} | {batch} | {format_cells(line, COLUMNS)} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Speed and quality of an artefact and of cheaper forms of it.")
    parser.add_argument("artefact", type=Path, nargs="?", default=ARTEFACT)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for line in table(parser.parse_args().artefact):
        print(line, flush=True)


if __name__ == "__main__":
    main()
