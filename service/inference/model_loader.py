"""Open an ONNX artefact: digest, seal, manifest and shapes, then verification. Independent of HTTP and of metrics."""

from pathlib import Path

import onnxruntime as ort

from model import contract
from model.contract import ContractError, Manifest
from service.errors import ArtefactRejected
from service.inference.cpu import available_cpus
from service.inference.onnx_model import Model, build_runner, open_session
from service.inference.verification import check_golden_windows, use_channel_major_graph, warm_up


def open_model(
    path: Path, required_digest: str = "", threads: int = 0, batch_rows: int = 1, deterministic: bool = False
) -> Model:
    """Open an artefact and verify it: digest, seal, manifest, shapes, golden windows, batch of N = N batches of 1.

    A channel-major graph in the file replaces the network if it gives the same bits on this machine. Every batch size
    that is a power of two up to `batch_rows` is run once, as warm-up for the first request. `deterministic` runs each
    window alone, so its bits do not depend on other rows of the batch.

    Raises:
        ArtefactRejected: a check fails. The message is one line with the reason.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactRejected(f"{path}: {error.strerror}") from None
    digest = contract.digest(content)
    try:
        if required_digest and digest != required_digest:
            raise ContractError(f"the digest is {digest}, ENGINE_HEALTH_MODEL_DIGEST requires {required_digest}")
        contract.check_seal(content)
        session = open_session(content, threads or available_cpus())
        manifest = _read_manifest(session)
        model = Model(manifest, digest, _read_input_shape(session, manifest), build_runner(session, manifest))
        _check_outputs(session, manifest)
        check_golden_windows(model)
        model = use_channel_major_graph(model, session, threads or available_cpus())
        model = warm_up(model, batch_rows, deterministic)
    except ContractError as error:
        raise ArtefactRejected(f"{path}: {error}") from None
    except Exception as error:  # a file may be malformed in any other way, and must be rejected
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactRejected(f"{path}: {type(error).__name__}: {reason}") from error
    return model


def _read_manifest(session: ort.InferenceSession) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(contract.MANIFEST_KEY)
    if text is None:
        raise ContractError("no manifest in the file; export it with this project, or give it one")
    return contract.parse_manifest(text)


def _read_input_shape(session: ort.InferenceSession, manifest: Manifest) -> tuple[int, ...]:
    inputs = session.get_inputs()
    if [i.name for i in inputs] != [contract.INPUT] or inputs[0].type != "tensor(float)":
        raise ContractError(
            f"expected one float32 input {contract.INPUT!r}, found {[(i.name, i.type) for i in inputs]}"
        )
    batch, *rest = inputs[0].shape or [0]
    if isinstance(batch, int) or not all(isinstance(size, int) for size in rest):
        raise ContractError(f"expected an input with a dynamic batch and fixed other dimensions, got {inputs[0].shape}")
    if manifest.window is not None and rest != [manifest.window, len(manifest.channels)]:
        raise ContractError(
            f"the manifest has {manifest.window} x {len(manifest.channels)} readings, the input is {rest}"
        )
    return tuple(rest)


def _check_outputs(session: ort.InferenceSession, manifest: Manifest) -> None:
    shapes = {output.name: output.shape for output in session.get_outputs()}
    if contract.LOGITS not in shapes or len(shapes[contract.LOGITS]) != 2:
        raise ContractError(f"no output {contract.LOGITS!r} of shape [batch, classes]; outputs are {sorted(shapes)}")
    width = shapes[contract.LOGITS][-1]
    if width != len(manifest.classes):
        raise ContractError(f"manifest names {len(manifest.classes)} classes, logits have {width}")
    if (contract.RUL in shapes) != (manifest.rul_thresholds is not None):
        raise ContractError("the output 'rul' and rul_thresholds of the manifest require each other")
