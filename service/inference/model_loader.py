"""The only ONNX Runtime: opens an artefact, makes it prove itself, runs batches. Knows no HTTP and no metrics."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model import contract
from model.batch_invariance import max_difference, run_alone
from model.contract import ContractError, Manifest
from service.errors import ArtefactRejected
from service.inference import probe_windows
from service.inference.cpu import allowed_cores
from service.inference.probe_windows import bits

Batch = npt.NDArray[np.float32]
PROBES = 3  # windows that prove a batch, beside the golden ones
FEWER = (0, 1, 3)  # rows less than a bucket: kernels treat what is left over in another way
RUL_UNITS = 100  # cycles are a hundred times as large as logits, and so is their rounding
FATAL_ONLY = 4  # ONNX Runtime's log severity: what goes wrong is raised, and said once


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
    planned: bool = False  # whether `run` is the plan in the file, and not the network's own graph: the same bits
    batch_difference: float = 0.0  # the most that logits, and RUL in hundreds of cycles, were seen to differ

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Names of the input's columns, in order; kept, because every request asks."""
        return self.manifest.channel_names


def open_model(
    path: Path, required_digest: str = "", threads: int = 0, batch_rows: int = 1, deterministic: bool = False
) -> Model:
    """Open an artefact and prove it: digest, seal, manifest, shapes, golden windows, batch of N = N batches of 1.

    A plan in the file, the network laid out for speed, is run in its place if it proves to give the same bits here.
    Every batch size that is a power of two up to `batch_rows` is run once, so that the first caller finds it warm.
    `deterministic` runs each window alone: then no company can change its bits.

    Raises:
        ArtefactRejected: any of these fails; one line says which.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactRejected(f"{path}: {error.strerror}") from None
    digest = contract.digest(content)
    try:
        if required_digest and digest != required_digest:
            raise ContractError(f"digest is {digest}, required is {required_digest}")
        contract.check_seal(content)
        opened = session(content, threads or allowed_cores())
        manifest = _manifest(opened)
        model = Model(manifest, digest, _input_shape(opened, manifest), _runner(opened, manifest))
        _check_outputs(opened, manifest)
        _check_golden(model)
        model = _planned(model, opened, threads or allowed_cores())
        model = _warm(model, batch_rows, deterministic)
    except ContractError as error:
        raise ArtefactRejected(f"{path}: {error}") from None
    except Exception as error:  # a file can be wrong in more ways than are named here; none may pass in silence
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactRejected(f"{path}: {type(error).__name__}: {reason}") from error
    return model


def metadata(content: bytes) -> dict[str, str]:
    """What a file says of itself, the manifest included.

    Raises:
        ContractError: ONNX Runtime cannot open it.
    """
    return dict(session(content, 1).get_modelmeta().custom_metadata_map)


def session(content: bytes, threads: int) -> ort.InferenceSession:
    """A graph, opened to run on so many threads.

    Raises:
        ContractError: ONNX Runtime cannot open it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle service uses no core
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for each way a file can be broken
        raise ContractError(f"not a usable ONNX file: {str(error).strip().splitlines()[0]}") from None


def _manifest(session: ort.InferenceSession) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(contract.MANIFEST_KEY)
    if text is None:
        raise ContractError("no manifest in the file; export it with this project, or give it one")
    return contract.parse_manifest(text)


def _input_shape(session: ort.InferenceSession, manifest: Manifest) -> tuple[int, ...]:
    inputs = session.get_inputs()
    if [i.name for i in inputs] != [contract.INPUT] or inputs[0].type != "tensor(float)":
        raise ContractError(
            f"expected one float32 input {contract.INPUT!r}, found {[(i.name, i.type) for i in inputs]}"
        )
    batch, *rest = inputs[0].shape or [0]
    if isinstance(batch, int) or not all(isinstance(size, int) for size in rest):
        raise ContractError(f"the input needs a free batch and fixed sizes after it, found {inputs[0].shape}")
    if manifest.window is not None and rest != [manifest.window, len(manifest.channels)]:
        raise ContractError(f"manifest says {manifest.window} x {len(manifest.channels)} readings, input is {rest}")
    return tuple(rest)


def _check_outputs(session: ort.InferenceSession, manifest: Manifest) -> None:
    shapes = {output.name: output.shape for output in session.get_outputs()}
    if contract.LOGITS not in shapes or len(shapes[contract.LOGITS]) != 2:
        raise ContractError(f"no output {contract.LOGITS!r} of shape [batch, classes]; outputs are {sorted(shapes)}")
    width = shapes[contract.LOGITS][-1]
    if width != len(manifest.classes):
        raise ContractError(f"manifest names {len(manifest.classes)} classes, logits have {width}")
    if (contract.RUL in shapes) != (manifest.rul_thresholds is not None):
        raise ContractError("an output 'rul' and rul_thresholds in the manifest go together")


def _runner(session: ort.InferenceSession, manifest: Manifest) -> Callable[[Batch], Outputs]:
    names = [output.name for output in session.get_outputs() if output.name in (contract.LOGITS, contract.RUL)]
    lone = _Lone(session, {name: (1, len(manifest.classes)) if name == contract.LOGITS else (1,) for name in names})

    def run(batch: Batch) -> Outputs:
        if len(batch) == 1:
            return lone.run(batch)
        found = dict(zip(names, session.run(names, {contract.INPUT: batch}), strict=True))
        return Outputs(found[contract.LOGITS], found.get(contract.RUL))

    return run


class _Lone(threading.local):
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


def _check_golden(model: Model) -> None:
    golden = model.manifest.golden
    try:
        windows = np.array([g.telemetry for g in golden], dtype=np.float32).reshape(len(golden), *model.input_shape)
        logits = np.array([g.logits for g in golden], dtype=np.float64).reshape(
            len(golden), len(model.manifest.classes)
        )
    except (ValueError, TypeError, OverflowError):
        raise ContractError("golden windows do not have the model's shapes") from None
    outputs = _check_answers(model, np.concatenate([windows, _probes(model, windows)]))
    if golden:
        _compare("golden window", outputs.logits[: len(golden)], logits, model.manifest.tolerance)
    if outputs.rul is not None and golden and all(g.rul is not None for g in golden):
        found, rul = outputs.rul[: len(golden)], np.array([g.rul for g in golden])
        _compare("golden window's RUL", found, rul, RUL_UNITS * model.manifest.tolerance)


def _planned(model: Model, opened: ort.InferenceSession, threads: int) -> Model:
    """The model, run by the plan in its file if there is one that gives the network's bits here; else as it is."""
    try:
        plan = contract.graph_beside(opened.get_modelmeta().custom_metadata_map, contract.PLAN_KEY)
        if plan is None or not model.manifest.golden:
            return model
        run = _runner(session(plan, threads), model.manifest)
        same = all(
            np.array_equal(bits(run(some)), bits(model.run(some))) for some in probe_windows.batches(model.manifest)
        )
    except Exception:  # each way in which a graph can fail has a class of its own, and here all mean: it is of no use
        return model
    return replace(model, run=run, planned=True) if same else model


def _warm(model: Model, batch_rows: int, deterministic: bool) -> Model:
    """Run every bucket at least once, and measure how far predictions in a batch differ from those of one row."""
    golden = np.array([g.telemetry for g in model.manifest.golden], dtype=np.float32)
    golden = golden.reshape(len(golden), *model.input_shape)
    probes = np.concatenate([golden, _probes(model, golden)])
    sizes = sorted({1 << k for k in range(batch_rows.bit_length()) if 1 << k <= batch_rows} | {batch_rows})
    batches = [(np.arange(size - fewer) + fewer) % len(probes) for size in sizes for fewer in FEWER if fewer < size]
    run = _columns_of(model.run)
    difference = max_difference(run, probes, run_alone(run, probes), batches, _units(model))
    if not deterministic:
        return replace(model, batch_difference=difference)
    return replace(model, run=_singly(model.run), batch_difference=0.0)


def _columns_of(run: Callable[[Batch], Outputs]) -> Callable[[Batch], list[Batch]]:
    """Return the outputs that are there, in order."""
    return lambda batch: [column for column in run(batch) if column is not None]


def _singly(run: Callable[[Batch], Outputs]) -> Callable[[Batch], Outputs]:
    """Each window in a batch of its own: kernels round by where in a batch a row lies, and by how large that is."""

    def singly(batch: Batch) -> Outputs:
        return joined([run(batch[i : i + 1]) for i in range(len(batch))])

    return singly


def joined(parts: Sequence[Outputs]) -> Outputs:
    """What the network answers for some rows after what it answers for others."""
    rul = [part.rul for part in parts if part.rul is not None]
    return Outputs(np.concatenate([part.logits for part in parts]), np.concatenate(rul) if rul else None)


def _probes(model: Model, golden: Batch) -> Batch:
    """Windows unlike each other: a graph that mixes the rows of its batch answers them otherwise than alone."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((PROBES, *model.input_shape))
    base = golden[np.arange(PROBES) % len(golden)] if len(golden) else np.zeros_like(noise)
    return (base + noise * np.maximum(np.abs(base) * 1e-3, 1.0 if not len(golden) else 0.0)).astype(np.float32)


def _check_answers(model: Model, windows: Batch) -> Outputs:
    """Return the outputs for some windows in one batch, after comparing them with those of batches of one."""
    run = _columns_of(model.run)
    try:
        outputs = model.run(windows)
        alone = run_alone(run, windows)
    except Exception as error:  # ONNX Runtime raises a class of its own for each kind of failure
        raise ContractError(f"the network fails on its own windows: {str(error).splitlines()[0]}") from None
    for name, found, shape in (
        ("logits", outputs.logits, (len(windows), len(model.manifest.classes))),
        ("rul", outputs.rul, (len(windows),)),
    ):
        if found is not None and (found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all()):
            raise ContractError(f"output {name!r} is not finite float32 of shape {list(shape)} on its own windows")
    names = ("batch of N against N batches of 1", "batch of N against N batches of 1, RUL")
    columns = [column for column in outputs if column is not None]
    for what, column, own, unit in zip(names, columns, alone, _units(model), strict=False):
        _compare(what, column, own, unit * model.manifest.tolerance)
    return outputs


def _units(model: Model) -> tuple[float, ...]:
    """Return the unit in which a difference of each output is compared with the tolerance."""
    return (1.0,) if model.manifest.rul_thresholds is None else (1.0, float(RUL_UNITS))


def _compare(what: str, found: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float) -> None:
    if found.shape != expected.shape:
        raise ContractError(f"{what}: answers of shape {list(found.shape)}, not {list(expected.shape)}")
    difference = float(np.max(np.abs(found.astype(np.float64) - expected)))
    if not difference <= tolerance:  # also when it is NaN
        raise ContractError(f"{what}: answers differ by {difference:.3g}, tolerance is {tolerance:.3g}")
