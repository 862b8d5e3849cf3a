"""Reduce a foreign ONNX graph to a classifier with one input and one output, named as in the contract.

Depends on onnx and the contract. Does not run the graph. Tensors are matched by name, also in branches and loops.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from model.contract import INPUT, LOGITS

MAX_PROTOBUF_BYTES = 2**31 - 1  # of one protobuf message
MAX_SHOWN_NAMES = 20  # in one message
SHAPE_OPS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}
VALUE_PRESERVING_OPS = SHAPE_OPS | {"Identity", "Cast", "Dropout", "Clip", "ZipMap"}
FIX_SHAPE_COMMAND = "python -m onnxruntime.tools.make_dynamic_shape_fixed"


class AttachError(Exception):
    """A file that cannot be converted to an artefact. The message is one line with the reason and a remedy."""


class Classifier(NamedTuple):
    """A network reduced to the nodes of its logits. `batch` is the declared batch size, None if it is dynamic."""

    proto: ModelProto
    input: str  # name of the input in the foreign file
    batch: int | None
    shape: tuple[int, ...]  # of one instance
    before_softmax: str | None  # input of a final softmax, if there is one


def read_model(path: Path) -> ModelProto:
    """Read a foreign file with its external weights.

    Raises:
        AttachError: the file is missing or not ONNX, or external weights are missing.
    """
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise AttachError(f"{path}: {error.strerror}") from None
    except Exception as error:  # protobuf has a separate exception class per kind of defect
        raise AttachError(f"{path} is not an ONNX file: {first_line(error)}") from None
    if not proto.graph.node:  # an empty file is a valid protobuf message
        raise AttachError(f"{path} is not an ONNX file: it has no nodes")
    try:
        locations = {
            entry.value
            for tensor in _constant_tensors(proto.graph)
            for entry in tensor.external_data
            if entry.key == "location"
        }
        size = path.stat().st_size + sum((path.parent / name).stat().st_size for name in locations)
        if size > MAX_PROTOBUF_BYTES:
            raise AttachError(f"{path} has {size} bytes with its weights; the maximum is {MAX_PROTOBUF_BYTES}")
        onnx.load_external_data_for_model(proto, str(path.parent))
    except OSError as error:
        raise AttachError(f"{path}: external weights {error.filename}: {error.strerror}") from None
    except (ValueError, onnx.checker.ValidationError) as error:
        raise AttachError(f"{path}: external weights: {first_line(error)}") from None
    return proto


def cut_classifier(proto: ModelProto, logits: str) -> Classifier:
    """Reduce a network to the nodes that compute one tensor, which may be an inner one.

    Raises:
        AttachError: there is no such tensor, or it is not computed from one float32 input of known shape.
    """
    graph = proto.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    if logits not in producers:
        raise AttachError(
            f"there is no tensor {logits!r}; outputs are {format_names(output.name for output in graph.output)}"
        )
    before_softmax = _softmax_input(producers, logits)
    needed = _needed_tensors(producers, logits)
    constants = {tensor.name for tensor in graph.initializer} | {
        tensor.values.name for tensor in graph.sparse_initializer
    }
    inputs = [value for value in graph.input if value.name in needed - constants]
    if len(inputs) != 1:
        input_names = format_names(value.name for value in inputs) if inputs else "no input"
        raise AttachError(f"{logits!r} is computed from {input_names}; a served network has exactly one input")
    batch, shape = _declared_shape(inputs[0])
    name = inputs[0].name
    _keep_needed(graph, needed)
    _rename_tensors(graph, {name: INPUT, logits: LOGITS})
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch or "batch", *shape]))
    graph.output.append(onnx.ValueInfoProto(name=LOGITS))  # ONNX Runtime infers its type
    proto.ir_version = max(proto.ir_version, 4)  # older versions require weights as inputs
    return Classifier(proto, name, batch, shape, before_softmax)


def free_batch(proto: ModelProto, shape: tuple[int, ...], classes: int) -> ModelProto:
    """Return a copy with a dynamic batch size in its declarations. The caller verifies that the graph supports it."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    copy.graph.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape]))
    copy.graph.output[0].CopyFrom(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", classes]))
    return copy


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def format_names(names: Iterable[str]) -> str:
    """Join quoted names for a message, at most MAX_SHOWN_NAMES."""
    quoted = [repr(name) for name in names]
    rest = f" and {len(quoted) - MAX_SHOWN_NAMES} more" if len(quoted) > MAX_SHOWN_NAMES else ""
    return ", ".join(quoted[:MAX_SHOWN_NAMES]) + rest


def _declared_shape(value: onnx.ValueInfoProto) -> tuple[int | None, tuple[int, ...]]:
    """Return the batch size (None if dynamic) and the shape of one instance."""
    tensor_type = value.type.tensor_type
    if tensor_type.elem_type != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(tensor_type.elem_type).lower()
        raise AttachError(f"input {value.name!r} is {name}; the service sends float32")
    sizes = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor_type.shape.dim]
    shape_text = f"[{', '.join(str(dim.dim_value or dim.dim_param or '?') for dim in tensor_type.shape.dim)}]"
    if len(sizes) < 2:
        raise AttachError(f"input {value.name!r} is {shape_text}; a batch of instances has at least two axes")
    shape = tuple(size for size in sizes[1:] if size is not None)
    if len(shape) != len(sizes) - 1:
        raise AttachError(
            f"input {value.name!r} is {shape_text}; only the batch may be dynamic: "
            f"fix the other axes with `{FIX_SHAPE_COMMAND}`"
        )
    return sizes[0], shape


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield branches and loop bodies of a node."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _used_names(node: NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, including those of its subgraphs."""
    yield from node.input
    for graph in _subgraphs(node):
        yield from (output.name for output in graph.output)
        for inner in graph.node:
            yield from _used_names(inner)


def _constant_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield every constant tensor."""
    yield from graph.initializer
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))
        for inner in _subgraphs(node):
            yield from _constant_tensors(inner)


def _needed_tensors(producers: dict[str, NodeProto], name: str) -> set[str]:
    """Return the names of a tensor and of all tensors that it depends on."""
    needed, pending = {name}, [name]
    while pending:
        node = producers.get(pending.pop())
        added = set(_used_names(node)) - needed if node else set()
        needed |= added
        pending += added
    return needed


def _softmax_input(producers: dict[str, NodeProto], name: str) -> str | None:
    """Return the input of the softmax that computes a tensor, through operators that preserve values, or None."""
    node = producers.get(name)
    while node is not None and node.op_type in VALUE_PRESERVING_OPS:
        node = producers.get(node.input[0])
    return node.input[0] if node is not None and node.op_type == "Softmax" else None


def _keep_needed(graph: GraphProto, needed: set[str]) -> None:
    """Remove nodes and tensors that are not needed, and metadata without effect on a runtime."""
    nodes = [node for node in graph.node if needed.intersection(node.output)]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    sparse = [tensor for tensor in graph.sparse_initializer if tensor.values.name in needed]
    for node in nodes:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for field, items in (("node", nodes), ("initializer", weights), ("sparse_initializer", sparse)):
        graph.ClearField(field)
        getattr(graph, field).extend(items)
    for field in ("input", "output", "value_info", "quantization_annotation", "metadata_props"):
        graph.ClearField(field)


def _rename_tensors(graph: GraphProto, names: dict[str, str]) -> None:
    """Rename tensors. Other tensors that have a new name already get a suffix."""
    used = {name for node in graph.node for name in (*_used_names(node), *node.output)} | set(names.values())
    for name in sorted(set(names.values()) - set(names)):
        unused = name
        while unused in used:
            unused += "_"
        names[name] = unused
    _apply_names(graph, names)


def _apply_names(graph: GraphProto, names: dict[str, str]) -> None:
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        tensor.name = names.get(tensor.name, tensor.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in _subgraphs(node):
            _apply_names(inner, names)
