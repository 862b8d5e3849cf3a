"""The routes of the Open Inference Protocol, version 2, which clients of KServe and Triton use.

Inputs are `telemetry` and, where it is known, `label`; outputs are the predictions of `/v1/predict` as tensors.
"""

from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from model import contract, numerics
from model.numerics import MAX_TEMPERATURE, MIN_TEMPERATURE, Floats
from service.api.offload import LARGE_BODY, Offloader
from service.api.openapi import document_route
from service.api.route_index import Endpoint, FastRoute
from service.codecs import oip_tensors
from service.codecs.oip_tensors import DecodedInference, TensorArray
from service.errors import InvalidInput, UnknownModel
from service.inference.onnx_model import Model
from service.inference.predictions import PredictionResult
from service.inference.predictor import MAX_LOOP_NUMBERS, Predictor
from service.lifecycle import Lifecycle
from service.server.body import read_large
from service.server.media_types import JSON, media_type
from service.server.responses import json_response
from service.server.scope import context_of

LABEL = "label"
INPUTS = {contract.INPUT: "FP32", LABEL: "INT64"}
INFER_ROUTE = "/v2/models/{name}/infer"
VERSIONED_ROUTE = "/v2/models/{name}/versions/{version}/infer"
HEADER = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"


def build_endpoint(lifecycle: Lifecycle, offloader: Offloader) -> Endpoint:
    """Return the endpoint of inference."""
    limits = lifecycle.settings

    async def infer(request: Request) -> Response:
        """Return the predictions of `/v1/predict` as tensors, JSON or binary."""
        media_type(request, (JSON, BINARY))
        context = context_of(request.scope)
        ticket = lifecycle.ready_predictor().admit(context.content_length)
        body = await read_large(request, limits.max_body_bytes, limits.request_seconds)
        predictor = lifecycle.ready_predictor()
        path: dict[str, str] = request.scope["path_params"]
        check_name(predictor.model, path["name"], path.get("version"))
        header = request.headers.get(HEADER)
        length = header and header.strip()
        inference = await offloader.run_if(
            len(body) > LARGE_BODY, lambda: oip_tensors.decode_inference(body, length, INPUTS)
        )
        telemetry = _telemetry(inference, predictor.model, limits.max_instances)
        ticket.rows(len(telemetry))
        targets, temperature = _targets(inference, predictor.model, len(telemetry)), _temperature(inference)
        outputs = _requested_outputs(inference, predictor.model)
        gone = partial(getattr, context, "disconnected")
        prediction = await predictor.predict(telemetry, targets, temperature, gone=gone)
        lifecycle.labels.count_submitted(prediction, targets, predictor.temperature)
        is_large = prediction.answers.logits.size > MAX_LOOP_NUMBERS
        return await offloader.run_if(is_large, lambda: _respond(inference, predictor, prediction, outputs))

    return infer


def build_router(lifecycle: Lifecycle, infer: Endpoint) -> APIRouter:
    """Return the router of the protocol."""
    router = APIRouter(tags=["open inference protocol"])
    problem = ("InferError", JSON)
    documentation = document_route(None, None, "404", problem=problem)

    @router.get("/v2")
    async def server() -> dict[str, Any]:
        """Return name, version and extensions of this server."""
        extensions = ["binary_tensor_data", "model_repository"]
        return {"name": "engine-health", "version": version("engine-health"), "extensions": extensions}

    @router.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Return 200 while the process is running."""
        return {"live": True}

    @router.get("/v2/health/ready", openapi_extra=documentation)
    async def ready() -> dict[str, bool]:
        """Return 200 if a model is verified, otherwise 503."""
        lifecycle.accepting_predictor()
        return {"ready": True}

    @router.get("/v2/models/{name}/versions/{version}", openapi_extra=documentation)
    @router.get("/v2/models/{name}", openapi_extra=documentation)
    async def model(name: str, version: str | None = None) -> Response:
        """Return inputs and outputs of the model."""
        return json_response(metadata(check_name(lifecycle.ready_predictor().model, name, version)))

    @router.get("/v2/models/{name}/versions/{version}/ready", openapi_extra=documentation)
    @router.get("/v2/models/{name}/ready", openapi_extra=documentation)
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        """Return 200 if the model serves, otherwise 503."""
        return {"name": check_name(lifecycle.accepting_predictor().model, name, version).manifest.name, "ready": True}

    inference = document_route("InferRequest", None, "404", problem=problem)
    inference["responses"]["200"]["content"] = {JSON: {}, BINARY: {}}
    for route, names in ((INFER_ROUTE, ("name",)), (VERSIONED_ROUTE, ("name", "version"))):
        parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        extra = inference | {"parameters": parameters}
        router.add_api_route(route, infer, methods=["POST"], openapi_extra=extra, route_class_override=FastRoute)

    @router.post("/v2/repository/index", openapi_extra=documentation)
    async def index() -> list[dict[str, str]]:
        """Return the models of this server (admin)."""
        manifest = lifecycle.ready_predictor().model.manifest
        return [{"name": manifest.name, "version": manifest.version, "state": "READY", "reason": ""}]

    @router.post(
        "/v2/repository/models/{name}/load", openapi_extra=document_route(None, None, "404", "409", problem=problem)
    )
    async def load(name: str) -> Response:
        """Load the configured artefact again while the active one serves, verify it, swap (admin)."""
        check_name(lifecycle.ready_predictor().model, name, None)
        return json_response({"name": name, "digest": await lifecycle.reload()})

    return router


def check_name(model: Model, name: str, version: str | None) -> Model:
    """Return the model if it has this name and version.

    Raises:
        UnknownModel: another name or version.
    """
    manifest = model.manifest
    if name != manifest.name or version not in (None, manifest.version):
        requested = f"{name[:80]!r}" + (f", version {version[:80]!r}" if version else "")
        served = f"{manifest.name!r}, version {manifest.version!r}"
        raise UnknownModel(f"unknown model {requested}; this server has {served}")
    return model


def metadata(model: Model) -> dict[str, Any]:
    """Return name, inputs and outputs of the model."""
    manifest = model.manifest

    def tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "datatype": datatype, "shape": [-1, *shape]}

    outputs = [tensor(name, kind, *shape) for name, (kind, shape) in _outputs(model).items()]
    inputs = [tensor(contract.INPUT, "FP32", *model.input_shape), tensor(LABEL, "INT64") | {"optional": True}]
    return {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": "onnxruntime_onnx",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {"digest": model.digest},
    }


def _outputs(model: Model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return datatype and shape of one row of each output, by name. The loss is available only with labels."""
    classes = (len(model.manifest.classes),)
    rul: dict[str, tuple[str, tuple[int, ...]]] = {"rul": ("FP32", ())}
    return {
        "logits": ("FP32", classes),
        "probabilities": ("FP32", classes),
        "health": ("BYTES", ()),
        **(rul if model.manifest.rul_thresholds is not None else {}),
        "loss": ("FP32", ()),
    }


def _telemetry(inference: DecodedInference, model: Model, max_rows: int) -> oip_tensors.TensorArray:
    telemetry = inference.inputs.get(contract.INPUT)
    if telemetry is None:
        raise InvalidInput(f"input {contract.INPUT!r} is missing")
    if telemetry.shape[1:] != model.input_shape or not 0 < len(telemetry) <= max_rows:
        raise InvalidInput(
            f"input {contract.INPUT!r}: shape {list(telemetry.shape[:8])}, expected [1..{max_rows}, "
            f"{', '.join(map(str, model.input_shape))}]"
        )
    # the sum is finite unless a value is not; only then the values are searched
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(telemetry.sum())
    if not finite and len(positions := np.argwhere(~np.isfinite(telemetry))):
        raise InvalidInput(f"input {contract.INPUT!r}: {positions[0].tolist()} is not finite")
    return telemetry


def _targets(inference: DecodedInference, model: Model, rows: int) -> Floats | None:
    labels, classes = inference.inputs.get(LABEL), len(model.manifest.classes)
    if labels is None:
        return None
    if labels.shape not in ((rows,), (rows, 1)):
        raise InvalidInput(f"input {LABEL!r}: shape {list(labels.shape[:8])}, expected [{rows}]")
    labels = labels.ravel()
    if not ((labels >= 0) & (labels < classes)).all():
        raise InvalidInput(f"input {LABEL!r}: class indices must be from 0 to {classes - 1}")
    return numerics.as_distributions(labels, classes)


def _temperature(inference: DecodedInference) -> float | None:
    value = inference.request.parameters.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise InvalidInput(f"parameter temperature must be a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")
    return float(value)


def _requested_outputs(inference: DecodedInference, model: Model) -> list[tuple[str, bool]]:
    """Return the requested outputs in order, and whether each is binary; all of them if none is requested."""
    available = [name for name in _outputs(model) if name != "loss" or LABEL in inference.inputs]
    requested, default = inference.request.outputs, _flag(inference.request.parameters, "binary_data_output", False)
    if not requested:
        return [(name, default) for name in available]
    for output in requested:
        if output.name not in available:
            reason = " (needs the input 'label')" if output.name == "loss" else ""
            raise InvalidInput(
                f"output {output.name[:80]!r} does not exist{reason}; outputs are {', '.join(available)}"
            )
        if output.parameters.get("classification"):
            raise InvalidInput(f"output {output.name!r}: classification is not supported; request 'health'")
    if len({output.name for output in requested}) != len(requested):
        raise InvalidInput("duplicate output in outputs")
    return [(output.name, _flag(output.parameters, "binary_data", default)) for output in requested]


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"parameter {name} must be true or false")
    return value


def _respond(
    inference: DecodedInference, predictor: Predictor, prediction: PredictionResult, outputs: list[tuple[str, bool]]
) -> Response:
    manifest, answers = predictor.model.manifest, prediction.answers

    def values(name: str) -> tuple[str, TensorArray]:
        if name == "health":
            classes = np.array([class_name.encode() for class_name in manifest.classes], dtype=object)
            return "BYTES", classes[answers.logits.argmax(axis=1)]
        numbers: dict[str, Any] = {"logits": answers.logits, "probabilities": answers.probabilities}
        numbers |= {"rul": answers.rul, "loss": prediction.loss}  # None only where they are not available
        return "FP32", np.asarray(numbers[name]).astype(np.float32, copy=False)

    head: dict[str, Any] = {"model_name": manifest.name, "model_version": manifest.version}
    head["parameters"] = {"digest": predictor.model.digest, "temperature": prediction.temperature}
    if inference.request.id is not None:
        head["id"] = inference.request.id
    tensors = [(name, *values(name)) for name, _ in outputs]
    body, length = oip_tensors.encode_inference(head, tensors, {name for name, binary in outputs if binary})
    if length is None:
        return Response(body, media_type=JSON)
    return Response(body, headers={HEADER: str(length)}, media_type=BINARY)
