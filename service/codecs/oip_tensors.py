"""Tensors of the Open Inference Protocol, version 2: JSON and the binary extension, in and out. Knows no model.

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
MAX_DIMENSIONS, MAX_ELEMENTS = 16, 2**40  # of a shape: no body holds so many, and no arithmetic on them is long
TensorArray = npt.NDArray[Any]


class DecodedInference(NamedTuple):
    """A request, its inputs as arrays by name."""

    asked: InferRequest
    inputs: dict[str, TensorArray]


def decode_inference(body: bytes | memoryview, header_length: str | None, dtypes: dict[str, str]) -> DecodedInference:
    """A request with all its tensors.

    Args:
        body: JSON, and the binary tensors behind it.
        header_length: the header Inference-Header-Content-Length: how much of the body is JSON.
        dtypes: the datatype that each known input must have.

    Raises:
        MalformedJson: the JSON part is none.
        InvalidInput: shapes, datatypes or sizes that do not fit, a name twice or unknown.
    """
    size = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 16):
            raise InvalidInput(f"Inference-Header-Content-Length: {header_length[:40]!r} is not a number of bytes")
        size = int(header_length)
        if size > len(body):
            raise InvalidInput(f"Inference-Header-Content-Length says {size}, the body has {len(body)} bytes")
    text = body[:size] if size < len(body) else body
    asked = parse(text, InferRequest)
    inputs: dict[str, TensorArray] = {}
    at = size
    for tensor in asked.inputs:
        if tensor.name not in dtypes or tensor.name in inputs:
            what = "twice" if tensor.name in inputs else f"unknown; inputs are {', '.join(dtypes)}"
            raise InvalidInput(f"input {tensor.name[:80]!r}: {what}")
        if tensor.datatype != dtypes[tensor.name]:
            raise InvalidInput(f"input {tensor.name!r}: datatype {tensor.datatype[:20]!r}, not {dtypes[tensor.name]}")
        inputs[tensor.name], at = _decode_tensor(tensor, body, at)
        tensor.data = UNSET  # the array has its numbers, and the raw JSON would keep the body
    if at != len(body):
        raise InvalidInput(f"{len(body) - at} bytes are left behind the last binary tensor")
    return DecodedInference(asked, inputs)


def _decode_tensor(tensor: Tensor, body: bytes | memoryview, at: int) -> tuple[TensorArray, int]:
    """The numbers of a tensor, and where the next binary one begins."""
    where, dtype = f"input {tensor.name!r}", DTYPES[tensor.datatype]
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise InvalidInput(f"{where}: shape has {len(tensor.shape)} sides, at most {MAX_DIMENSIONS} are taken")
    for side in tensor.shape:
        if not 0 <= side <= MAX_ELEMENTS:
            raise InvalidInput(f"{where}: shape {tensor.shape[:8]} has a side that is not from 0 to {MAX_ELEMENTS}")
    if math.prod(max(side, 1) for side in tensor.shape) > MAX_ELEMENTS:  # also beside a side of 0, as numpy has it
        raise InvalidInput(f"{where}: shape {tensor.shape[:8]} is larger than any body")
    count = math.prod(tensor.shape)
    told = tensor.parameters.get("binary_data_size")
    if told is None:
        return _parse_json_data(tensor, where, dtype, count), at
    if isinstance(told, bool) or not isinstance(told, int) or told != count * dtype.itemsize:
        raise InvalidInput(
            f"{where}: binary_data_size {str(told)[:40]}, but shape {tensor.shape[:8]} needs another size"
        )
    if not isinstance(tensor.data, UnsetType):
        raise InvalidInput(f"{where}: both data and binary_data_size")
    if at + told > len(body):
        raise InvalidInput(f"{where}: {told} bytes announced, {len(body) - at} are there")
    found: TensorArray = np.frombuffer(body, dtype, count, at).reshape(tensor.shape)
    return found, at + told


def _parse_json_data(tensor: Tensor, where: str, dtype: np.dtype[Any], count: int) -> TensorArray:
    if isinstance(tensor.data, UnsetType):
        raise InvalidInput(f"{where}: neither data nor binary_data_size")
    floats = dtype.kind == "f"
    values = parse_numbers(bytes(tensor.data), "d" if floats else "i")
    if floats and values is not None:
        values = to_float32(values)
    if values is None:
        raise InvalidInput(f"{where}: data must be numbers that {tensor.datatype} can hold")
    if values.size != count:
        raise InvalidInput(f"{where}: {values.size} numbers, but shape {tensor.shape[:8]} needs another count")
    return values.reshape(tensor.shape)


def encode_inference(
    head: dict[str, Any], outputs: list[tuple[str, str, TensorArray]], binary: set[str]
) -> tuple[bytes, int | None]:
    """The answer's body, and how much of it is JSON if binary tensors follow.

    Args:
        head: what stands beside the outputs.
        outputs: name, datatype and values; BYTES as an array of `bytes`.
        binary: the names of those that leave as bytes.
    """
    described, tail = [], []
    for name, datatype, values in outputs:
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if name in binary:
            raw = (
                _pack_strings(values) if datatype == "BYTES" else values.astype(DTYPES[datatype], copy=False).tobytes()
            )
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        elif datatype == "BYTES":
            entry["data"] = [text.decode() for text in values.ravel()]
        else:
            entry["data"] = np.ascontiguousarray(values).ravel()
        described.append(entry)
    text = orjson.dumps(head | {"outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((text, *tail)), len(text)) if tail else (text, None)


def _pack_strings(values: TensorArray) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in values.ravel())
