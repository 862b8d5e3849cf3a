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
LOG_FATAL_ONLY = 4  # ONNX Runtime's log severity: what goes wrong is raised, and said once


class Outputs(NamedTuple):
    """What the network answers for a batch of N: logits (N, C) float32, RUL (N,) float32 or None without that head."""

    logits: Batch
    rul: Batch | None


@dataclass(frozen=True)
class Model:
    """An artefact that proved itself. `input_shape` is that of one instance, without the batch."""

    manifest: Manifest
    digest: str
    input_shape: tuple[int, ...]
    run: Callable[[Batch], Outputs]
    optimised_graph: bool = (
        False  # whether `run` is the plan in the file, and not the network's own graph: the same bits
    )
    batch_max_difference: float = 0.0  # the most that logits, and RUL in hundreds of cycles, were seen to differ

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Names of the input's columns, in order; kept, because every request asks."""
        return self.manifest.channel_names


def read_metadata(content: bytes) -> dict[str, str]:
    """What a file says of itself, the manifest included.

    Raises:
        ContractError: ONNX Runtime cannot open it.
    """
    return dict(open_session(content, 1).get_modelmeta().custom_metadata_map)


def open_session(content: bytes, threads: int) -> ort.InferenceSession:
    """A graph, opened to run on so many threads.

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
    except Exception as error:  # ONNX Runtime raises a class of its own for each way a file can be broken
        raise ContractError(f"not a usable ONNX file: {str(error).strip().splitlines()[0]}") from None


def build_runner(session: ort.InferenceSession, manifest: Manifest) -> Callable[[Batch], Outputs]:
    """Return a function that runs a session on a batch (N, *input_shape)."""
    names = [output.name for output in session.get_outputs() if output.name in (contract.LOGITS, contract.RUL)]
    lone = _SingleWindowRunner(
        session, {name: (1, len(manifest.classes)) if name == contract.LOGITS else (1,) for name in names}
    )

    def run(batch: Batch) -> Outputs:
        if len(batch) == 1:
            return lone.run(batch)
        found = dict(zip(names, session.run(names, {contract.INPUT: batch}), strict=True))
        return Outputs(found[contract.LOGITS], found.get(contract.RUL))

    return run


class _SingleWindowRunner(threading.local):
    """A window that comes alone: its answers lie where those of the last one did, one place a thread.

    Nothing is looked up by its name and nothing is allocated for them, which is an eighth of a lone window's time.
    """

    def __init__(self, session: ort.InferenceSession, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._session, self._bound = session, session.io_binding()
        self._found = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        for name, found in self._found.items():
            self._bound.bind_output(name, "cpu", 0, np.float32, found.shape, found.ctypes.data)

    def run(self, window: Batch) -> Outputs:
        """What the network answers for a batch of one."""
        self._bound.bind_cpu_input(contract.INPUT, np.ascontiguousarray(window))
        self._session.run_with_iobinding(self._bound)
        rul = self._found.get(contract.RUL)
        return Outputs(self._found[contract.LOGITS].copy(), None if rul is None else rul.copy())


def run_singly(run: Callable[[Batch], Outputs]) -> Callable[[Batch], Outputs]:
    """Each window in a batch of its own: kernels round by where in a batch a row lies, and by how large that is."""

    def singly(batch: Batch) -> Outputs:
        return concatenate_outputs([run(batch[i : i + 1]) for i in range(len(batch))])

    return singly


def concatenate_outputs(parts: Sequence[Outputs]) -> Outputs:
    """What the network answers for some rows after what it answers for others."""
    rul = [part.rul for part in parts if part.rul is not None]
    return Outputs(np.concatenate([part.logits for part in parts]), np.concatenate(rul) if rul else None)
