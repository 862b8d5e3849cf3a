"""The Open Inference Protocol, version 2: what KServe's and Triton's clients speak. Translates, decides nothing.

Inputs `telemetry` and, where the truth is known, `label`; the answers of `/v1/predict` as tensors.
"""

from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from model import contract, numerics
from model.numerics import MAX_TEMPERATURE, MIN_TEMPERATURE, Floats
from service.api.predict import LARGE_BODY, Aside, Endpoint, documented, json_response
from service.api.route_index import FastRoute
from service.codecs import oip_tensors
from service.codecs.oip_tensors import Array, Inference
from service.errors import InvalidInput, UnknownModel
from service.inference.model_loader import Model
from service.inference.predictions import Prediction
from service.inference.predictor import MANY_NUMBERS, Predictor
from service.lifecycle import Lifecycle
from service.server.body import JSON, announced, leaving, media_type, read_large

LABEL = "label"
INPUTS = {contract.INPUT: "FP32", LABEL: "INT64"}
INFER_ROUTE = "/v2/models/{name}/infer"
VERSIONED_ROUTE = "/v2/models/{name}/versions/{version}/infer"
HEADER = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"


def build_endpoint(lifecycle: Lifecycle, aside: Aside) -> Endpoint:
    """The inference call itself."""
    limits = lifecycle.settings

    async def infer(request: Request) -> Response:
        """Inference as tensors, JSON or binary: the answers of `/v1/predict`."""
        media_type(request, (JSON, BINARY))
        ticket = lifecycle.ready_predictor().admit(announced(request))
        body = await read_large(request, limits.max_body_bytes, limits.request_seconds)
        predictor = lifecycle.ready_predictor()
        path: dict[str, str] = request.scope["path_params"]
        named(predictor.model, path["name"], path.get("version"))
        told = request.headers.get(HEADER)
        length = told and told.strip()
        inference = await aside.run(len(body) > LARGE_BODY, lambda: oip_tensors.read(body, length, INPUTS))
        telemetry = _telemetry(inference, predictor.model, limits.max_instances)
        ticket.rows(len(telemetry))
        targets, temperature = _targets(inference, predictor.model, len(telemetry)), _temperature(inference)
        wanted = _wanted(inference, predictor.model)
        gone = leaving(request)
        found = await predictor.predict(telemetry, targets, temperature, gone=gone)
        lifecycle.labels.count_submitted(found, targets, predictor.temperature)
        many = found.answers.logits.size > MANY_NUMBERS
        return await aside.run(many, lambda: _answer(inference, predictor, found, wanted))

    return infer


def build_router(lifecycle: Lifecycle, infer: Endpoint) -> APIRouter:
    """All routes of the protocol."""
    router = APIRouter(tags=["open inference protocol"])
    problem = ("InferError", JSON)
    shown = documented(None, None, "404", problem=problem)

    @router.get("/v2")
    async def server() -> dict[str, Any]:
        """Name, version and extensions of this server."""
        extensions = ["binary_tensor_data", "model_repository"]
        return {"name": "engine-health", "version": version("engine-health"), "extensions": extensions}

    @router.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """The process runs."""
        return {"live": True}

    @router.get("/v2/health/ready", openapi_extra=shown)
    async def ready() -> dict[str, bool]:
        """A model has proved itself; send traffic."""
        lifecycle.accepting()
        return {"ready": True}

    @router.get("/v2/models/{name}/versions/{version}", openapi_extra=shown)
    @router.get("/v2/models/{name}", openapi_extra=shown)
    async def model(name: str, version: str | None = None) -> Response:
        """Inputs and outputs of the model."""
        return json_response(metadata(named(lifecycle.ready_predictor().model, name, version)))

    @router.get("/v2/models/{name}/versions/{version}/ready", openapi_extra=shown)
    @router.get("/v2/models/{name}/ready", openapi_extra=shown)
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        """The model answers."""
        return {"name": named(lifecycle.accepting().model, name, version).manifest.name, "ready": True}

    asked = documented("InferRequest", None, "404", problem=problem)
    asked["responses"]["200"]["content"] = {JSON: {}, BINARY: {}}
    for route, names in ((INFER_ROUTE, ("name",)), (VERSIONED_ROUTE, ("name", "version"))):
        places = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        extra = asked | {"parameters": places}
        router.add_api_route(route, infer, methods=["POST"], openapi_extra=extra, route_class_override=FastRoute)

    @router.post("/v2/repository/index", openapi_extra=shown)
    async def index() -> list[dict[str, str]]:
        """The models of this server (admin)."""
        manifest = lifecycle.ready_predictor().model.manifest
        return [{"name": manifest.name, "version": manifest.version, "state": "READY", "reason": ""}]

    @router.post(
        "/v2/repository/models/{name}/load", openapi_extra=documented(None, None, "404", "409", problem=problem)
    )
    async def load(name: str) -> Response:
        """Open the configured artefact again beside the one that answers, prove it, swap (admin)."""
        named(lifecycle.ready_predictor().model, name, None)
        return json_response({"name": name, "digest": await lifecycle.reload()})

    return router


def named(model: Model, name: str, version: str | None) -> Model:
    """The model, if it is the one that is meant.

    Raises:
        UnknownModel: another name or version.
    """
    manifest = model.manifest
    if name != manifest.name or version not in (None, manifest.version):
        asked = f"{name[:80]!r}" + (f", version {version[:80]!r}" if version else "")
        raise UnknownModel(f"unknown model {asked}; this server has {manifest.name!r}, version {manifest.version!r}")
    return model


def metadata(model: Model) -> dict[str, Any]:
    """What the model takes and gives."""
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
    """The outputs in order, by name: datatype, and shape of one row. There is a loss only where a label is given."""
    classes = (len(model.manifest.classes),)
    rul: dict[str, tuple[str, tuple[int, ...]]] = {"rul": ("FP32", ())}
    return {
        "logits": ("FP32", classes),
        "probabilities": ("FP32", classes),
        "health": ("BYTES", ()),
        **(rul if model.manifest.rul_thresholds is not None else {}),
        "loss": ("FP32", ()),
    }


def _telemetry(inference: Inference, model: Model, most: int) -> oip_tensors.Array:
    found = inference.inputs.get(contract.INPUT)
    if found is None:
        raise InvalidInput(f"input {contract.INPUT!r} is missing")
    if found.shape[1:] != model.input_shape or not 0 < len(found) <= most:
        raise InvalidInput(
            f"input {contract.INPUT!r}: shape {list(found.shape[:8])}, expected [1..{most}, "
            f"{', '.join(map(str, model.input_shape))}]"
        )
    # a sum shows what is not finite in one look; only a suspicious one is followed by a second
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.isfinite(found.sum())
    if not whole and len(bad := np.argwhere(~np.isfinite(found))):
        raise InvalidInput(f"input {contract.INPUT!r}: {bad[0].tolist()} is not finite")
    return found


def _targets(inference: Inference, model: Model, rows: int) -> Floats | None:
    labels, classes = inference.inputs.get(LABEL), len(model.manifest.classes)
    if labels is None:
        return None
    if labels.shape not in ((rows,), (rows, 1)):
        raise InvalidInput(f"input {LABEL!r}: shape {list(labels.shape[:8])}, expected [{rows}]")
    labels = labels.ravel()
    if not ((labels >= 0) & (labels < classes)).all():
        raise InvalidInput(f"input {LABEL!r}: class indices must be from 0 to {classes - 1}")
    return numerics.as_distributions(labels, classes)


def _temperature(inference: Inference) -> float | None:
    t = inference.asked.parameters.get("temperature")
    if t is None:
        return None
    if isinstance(t, bool) or not isinstance(t, int | float) or not MIN_TEMPERATURE <= t <= MAX_TEMPERATURE:
        raise InvalidInput(f"parameter temperature must be a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")
    return float(t)


def _wanted(inference: Inference, model: Model) -> list[tuple[str, bool]]:
    """Names of the outputs in the order asked for, and whether each leaves as bytes; all of them if none is named."""
    known = [name for name in _outputs(model) if name != "loss" or LABEL in inference.inputs]
    asked, default = inference.asked.outputs, _flag(inference.asked.parameters, "binary_data_output", False)
    if not asked:
        return [(name, default) for name in known]
    for output in asked:
        if output.name not in known:
            why = " (needs the input 'label')" if output.name == "loss" else ""
            raise InvalidInput(f"output {output.name[:80]!r} is not there{why}; outputs are {', '.join(known)}")
        if output.parameters.get("classification"):
            raise InvalidInput(f"output {output.name!r}: classification is not offered; ask for 'health'")
    if len({output.name for output in asked}) != len(asked):
        raise InvalidInput("an output is asked for twice")
    return [(output.name, _flag(output.parameters, "binary_data", default)) for output in asked]


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"parameter {name} must be true or false")
    return value


def _answer(inference: Inference, predictor: Predictor, found: Prediction, wanted: list[tuple[str, bool]]) -> Response:
    manifest, answers = predictor.model.manifest, found.answers

    def values(name: str) -> tuple[str, Array]:
        if name == "health":
            names = np.array([name.encode() for name in manifest.classes], dtype=object)
            return "BYTES", names[answers.logits.argmax(axis=1)]
        of = {"logits": answers.logits, "probabilities": answers.probabilities, "rul": answers.rul, "loss": found.loss}
        return "FP32", np.asarray(of[name]).astype(np.float32, copy=False)

    head: dict[str, Any] = {"model_name": manifest.name, "model_version": manifest.version}
    head["parameters"] = {"digest": predictor.model.digest, "temperature": found.temperature}
    if inference.asked.id is not None:
        head["id"] = inference.asked.id
    outputs = [(name, *values(name)) for name, _ in wanted]
    body, length = oip_tensors.write(head, outputs, {name for name, binary in wanted if binary})
    if length is None:
        return Response(body, media_type=JSON)
    return Response(body, headers={HEADER: str(length)}, media_type=BINARY)
