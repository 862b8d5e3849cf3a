"""Run an opened artefact with ONNX Runtime. Independent of HTTP and of metrics."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model import contract
from model.contract import ContractError, Manifest

Batch = npt.NDArray[np.float32]
LOG_FATAL_ONLY = 4  # log severity of ONNX Runtime; errors are raised instead


class Outputs(NamedTuple):
    """Outputs of the network for a batch of N: logits (N, C) float32, RUL (N,) float32 or None without that head."""

    logits: Batch
    rul: Batch | None


@dataclass(frozen=True)
class Model:
    """A verified artefact. `input_shape` is that of one instance, without the batch."""

    manifest: Manifest
    digest: str
    input_shape: tuple[int, ...]
    run: Callable[[Batch], Outputs]
    optimised_graph: bool = False  # whether `run` uses the channel-major graph of the file, which gives the same bits
    batch_max_difference: float = 0.0  # largest measured difference of logits, and of RUL in hundreds of cycles

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Names of the input's columns, in order; cached, because every request needs them."""
        return self.manifest.channel_names


def read_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a file, including the manifest.

    Raises:
        ContractError: ONNX Runtime cannot open it.
    """
    return dict(open_session(content, 1).get_modelmeta().custom_metadata_map)


def open_session(content: bytes, threads: int) -> ort.InferenceSession:
    """Open a graph that runs on a number of threads.

    Raises:
        ContractError: ONNX Runtime cannot open it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle service uses no core
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a separate exception class per kind of defect
        raise ContractError(f"not a usable ONNX file: {str(error).strip().splitlines()[0]}") from None


def build_runner(session: ort.InferenceSession, manifest: Manifest) -> Callable[[Batch], Outputs]:
    """Return a function that runs a session on a batch (N, *input_shape)."""
    names = [output.name for output in session.get_outputs() if output.name in (contract.LOGITS, contract.RUL)]
    single = _SingleWindowRunner(
        session, {name: (1, len(manifest.classes)) if name == contract.LOGITS else (1,) for name in names}
    )

    def run(batch: Batch) -> Outputs:
        if len(batch) == 1:
            return single.run(batch)
        outputs = dict(zip(names, session.run(names, {contract.INPUT: batch}), strict=True))
        return Outputs(outputs[contract.LOGITS], outputs.get(contract.RUL))

    return run


class _SingleWindowRunner(threading.local):
    """Runs single windows with the same output buffers each time, one set per thread.

    This avoids name lookups and allocations, which take an eighth of the time of a single window.
    """

    def __init__(self, session: ort.InferenceSession, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._session, self._binding = session, session.io_binding()
        self._outputs = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        for name, buffer in self._outputs.items():
            self._binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)

    def run(self, window: Batch) -> Outputs:
        """Return copies of the outputs for a batch of one."""
        self._binding.bind_cpu_input(contract.INPUT, np.ascontiguousarray(window))
        self._session.run_with_iobinding(self._binding)
        rul = self._outputs.get(contract.RUL)
        return Outputs(self._outputs[contract.LOGITS].copy(), None if rul is None else rul.copy())


def run_singly(run: Callable[[Batch], Outputs]) -> Callable[[Batch], Outputs]:
    """Return a function that runs each window in a separate batch.

    Kernels round differently depending on the size of the batch and the position of a row in it.
    """

    def singly(batch: Batch) -> Outputs:
        return concatenate_outputs([run(batch[i : i + 1]) for i in range(len(batch))])

    return singly


def concatenate_outputs(parts: Sequence[Outputs]) -> Outputs:
    """Concatenate the outputs of several batches."""
    rul = [part.rul for part in parts if part.rul is not None]
    return Outputs(np.concatenate([part.logits for part in parts]), np.concatenate(rul) if rul else None)
