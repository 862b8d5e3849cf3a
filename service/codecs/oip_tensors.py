"""Decode and encode tensors of the Open Inference Protocol, version 2, as JSON and with the binary extension.

https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
from msgspec import UNSET, UnsetType

from service.codecs.json_numbers import parse_numbers
from service.codecs.number_parser import to_float32
from service.codecs.parse import parse
from service.codecs.requests import InferRequest, Tensor
from service.errors import InvalidInput

DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
MAX_DIMENSIONS, MAX_ELEMENTS = 16, 2**40  # of a shape: no body holds more, and their product is computed quickly
TensorArray = npt.NDArray[Any]


class DecodedInference(NamedTuple):
    """A request, and its inputs as arrays by name."""

    request: InferRequest
    inputs: dict[str, TensorArray]


def decode_inference(body: bytes | memoryview, header_length: str | None, dtypes: dict[str, str]) -> DecodedInference:
    """Decode a request with all its tensors.

    Args:
        body: JSON, followed by the binary tensors.
        header_length: the header Inference-Header-Content-Length: the number of bytes of JSON.
        dtypes: the required datatype of each input, by name.

    Raises:
        MalformedJson: the JSON part is not JSON.
        InvalidInput: shapes, datatypes or sizes that do not fit; a duplicate or unknown name.
    """
    json_size = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 16):
            raise InvalidInput(f"Inference-Header-Content-Length: {header_length[:40]!r} is not a number of bytes")
        json_size = int(header_length)
        if json_size > len(body):
            raise InvalidInput(f"Inference-Header-Content-Length is {json_size}, the body has {len(body)} bytes")
    text = body[:json_size] if json_size < len(body) else body
    request = parse(text, InferRequest)
    inputs: dict[str, TensorArray] = {}
    position = json_size
    for tensor in request.inputs:
        if tensor.name not in dtypes or tensor.name in inputs:
            problem = "twice" if tensor.name in inputs else f"unknown; inputs are {', '.join(dtypes)}"
            raise InvalidInput(f"input {tensor.name[:80]!r}: {problem}")
        if tensor.datatype != dtypes[tensor.name]:
            raise InvalidInput(f"input {tensor.name!r}: datatype {tensor.datatype[:20]!r}, not {dtypes[tensor.name]}")
        inputs[tensor.name], position = _decode_tensor(tensor, body, position)
        tensor.data = UNSET  # the array has the numbers, and the raw JSON would keep the body in memory
    if position != len(body):
        raise InvalidInput(f"{len(body) - position} bytes follow the last binary tensor")
    return DecodedInference(request, inputs)


def _decode_tensor(tensor: Tensor, body: bytes | memoryview, position: int) -> tuple[TensorArray, int]:
    """Return the numbers of a tensor, and the position of the next binary tensor."""
    place, dtype = f"input {tensor.name!r}", DTYPES[tensor.datatype]
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise InvalidInput(f"{place}: shape has {len(tensor.shape)} dimensions, the limit is {MAX_DIMENSIONS}")
    for side in tensor.shape:
        if not 0 <= side <= MAX_ELEMENTS:
            raise InvalidInput(
                f"{place}: shape {tensor.shape[:8]} has a dimension that is not from 0 to {MAX_ELEMENTS}"
            )
    if math.prod(max(side, 1) for side in tensor.shape) > MAX_ELEMENTS:  # numpy also limits the other sides if one is 0
        raise InvalidInput(f"{place}: shape {tensor.shape[:8]} is larger than any body")
    count = math.prod(tensor.shape)
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        return _parse_json_data(tensor, place, dtype, count), position
    if isinstance(size, bool) or not isinstance(size, int) or size != count * dtype.itemsize:
        raise InvalidInput(
            f"{place}: binary_data_size {str(size)[:40]}, but shape {tensor.shape[:8]} needs another size"
        )
    if not isinstance(tensor.data, UnsetType):
        raise InvalidInput(f"{place}: expected data or binary_data_size, got both")
    if position + size > len(body):
        raise InvalidInput(f"{place}: {size} bytes expected, got {len(body) - position}")
    values: TensorArray = np.frombuffer(body, dtype, count, position).reshape(tensor.shape)
    return values, position + size


def _parse_json_data(tensor: Tensor, place: str, dtype: np.dtype[Any], count: int) -> TensorArray:
    if isinstance(tensor.data, UnsetType):
        raise InvalidInput(f"{place}: expected data or binary_data_size")
    floats = dtype.kind == "f"
    values = parse_numbers(bytes(tensor.data), "d" if floats else "i")
    if floats and values is not None:
        values = to_float32(values)
    if values is None:
        raise InvalidInput(f"{place}: data must be numbers that {tensor.datatype} can hold")
    if values.size != count:
        raise InvalidInput(f"{place}: {values.size} numbers, but shape {tensor.shape[:8]} needs another count")
    return values.reshape(tensor.shape)


def encode_inference(
    head: dict[str, Any], outputs: list[tuple[str, str, TensorArray]], binary: set[str]
) -> tuple[bytes, int | None]:
    """Return the body of a response, and the number of bytes of JSON if binary tensors follow.

    Args:
        head: all fields except the outputs.
        outputs: name, datatype and values; BYTES as an array of `bytes`.
        binary: the names of the outputs that are encoded as binary tensors.
    """
    descriptions, tail = [], []
    for name, datatype, values in outputs:
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if name in binary:
            is_text = datatype == "BYTES"
            raw = _pack_strings(values) if is_text else values.astype(DTYPES[datatype], copy=False).tobytes()
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        elif datatype == "BYTES":
            entry["data"] = [text.decode() for text in values.ravel()]
        else:
            entry["data"] = np.ascontiguousarray(values).ravel()
        descriptions.append(entry)
    text = orjson.dumps(head | {"outputs": descriptions}, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((text, *tail)), len(text)) if tail else (text, None)


def _pack_strings(values: TensorArray) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in values.ravel())
