"""Cutting a classifier out of a foreign ONNX graph: one tensor in, one tensor out, named as the contract names them.

Knows onnx and the contract's names; runs nothing. Tensors are found by name, also from inside of branches and loops.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from model.contract import INPUT, LOGITS

MOST_BYTES = 2**31 - 1  # of one protobuf message, which a file of the contract is
SHOWN = 20  # names that a message lists
KEEPING = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Dropout", "Clip", "ZipMap"}
FIX = "python -m onnxruntime.tools.make_dynamic_shape_fixed"


class AttachError(Exception):
    """A file that cannot become an artefact; the message is one line and says why, and what would help."""


class Classifier(NamedTuple):
    """A network cut to what its logits need, tensors renamed. `batch` is what the file declares: a number, or free."""

    proto: ModelProto
    input: str  # its name in the foreign file
    batch: int | None
    shape: tuple[int, ...]  # of one instance
    before_softmax: str | None  # the tensor that a final softmax was made of, if the graph shows one


def read(path: Path) -> ModelProto:
    """A foreign file, weights that lie beside it included.

    Raises:
        AttachError: missing, no ONNX file, or its weights are not where it says.
    """
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise AttachError(f"{path}: {error.strerror}") from None
    except Exception as error:  # protobuf has classes of its own for each way a file can be broken
        raise AttachError(f"{path} is not an ONNX file: {first_line(error)}") from None
    if not proto.graph.node:  # an empty file is a valid message
        raise AttachError(f"{path} is not an ONNX file: it holds no network")
    try:
        beside = {
            entry.value for tensor in _stored(proto.graph) for entry in tensor.external_data if entry.key == "location"
        }
        size = path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)
        if size > MOST_BYTES:
            raise AttachError(f"{path} has {size} bytes with its weights; one file can have {MOST_BYTES}")
        onnx.load_external_data_for_model(proto, str(path.parent))
    except OSError as error:
        raise AttachError(f"{path}: weights beside it, {error.filename}: {error.strerror}") from None
    except (ValueError, onnx.checker.ValidationError) as error:
        raise AttachError(f"{path}: weights beside it: {first_line(error)}") from None
    return proto


def cut(proto: ModelProto, logits: str) -> Classifier:
    """The part of a network that makes one tensor, which may be any inside of it.

    Raises:
        AttachError: no such tensor, or it is not made from one float32 input of known shape.
    """
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    if logits not in makers:
        raise AttachError(
            f"no tensor {logits!r} is computed; outputs are {listed(output.name for output in graph.output)}"
        )
    before_softmax = _before_softmax(makers, logits)
    needed = _needed(makers, logits)
    constants = {tensor.name for tensor in graph.initializer} | {
        tensor.values.name for tensor in graph.sparse_initializer
    }
    inputs = [value for value in graph.input if value.name in needed - constants]
    if len(inputs) != 1:
        found = listed(value.name for value in inputs) if inputs else "no input at all"
        raise AttachError(f"{logits!r} is computed from {found}; a network that is served has one input")
    batch, shape = _declared(inputs[0])
    name = inputs[0].name
    _keep(graph, needed)
    _rename(graph, {name: INPUT, logits: LOGITS})
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch or "batch", *shape]))
    graph.output.append(onnx.ValueInfoProto(name=LOGITS))  # ONNX Runtime finds out what it is
    proto.ir_version = max(proto.ir_version, 4)  # before, weights had to be inputs
    return Classifier(proto, name, batch, shape, before_softmax)


def freed(proto: ModelProto, shape: tuple[int, ...], classes: int) -> ModelProto:
    """A copy whose batch is declared free. Whether the graph inside agrees is for others to prove."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    copy.graph.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape]))
    copy.graph.output[0].CopyFrom(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", classes]))
    return copy


def first_line(error: Exception) -> str:
    """What an error says first; libraries go on for pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[str]) -> str:
    """Names as a person reads them, not without end."""
    found = [repr(name) for name in names]
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _declared(value: onnx.ValueInfoProto) -> tuple[int | None, tuple[int, ...]]:
    """Batch (None if free) and shape of one instance."""
    kind = value.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise AttachError(f"input {value.name!r} is {name}; the service sends float32")
    sizes = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
    shown = f"[{', '.join(str(dim.dim_value or dim.dim_param or '?') for dim in kind.shape.dim)}]"
    if len(sizes) < 2:
        raise AttachError(f"input {value.name!r} is {shown}; a batch of instances has at least two axes")
    shape = tuple(size for size in sizes[1:] if size is not None)
    if len(shape) != len(sizes) - 1:
        raise AttachError(f"input {value.name!r} is {shown}; only the batch may be free: fix the others with `{FIX}`")
    return sizes[0], shape


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    """Branches and loop bodies of a node."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _used(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, its branches' included."""
    yield from node.input
    for graph in _graphs(node):
        yield from (output.name for output in graph.output)
        for inner in graph.node:
            yield from _used(inner)


def _stored(graph: GraphProto) -> Iterator[TensorProto]:
    """Every constant tensor."""
    yield from graph.initializer
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))
        for inner in _graphs(node):
            yield from _stored(inner)


def _needed(makers: dict[str, NodeProto], name: str) -> set[str]:
    """The tensors that one is made from, itself included."""
    found, open_ = {name}, [name]
    while open_:
        node = makers.get(open_.pop())
        new = set(_used(node)) - found if node else set()
        found |= new
        open_ += new
    return found


def _before_softmax(makers: dict[str, NodeProto], name: str) -> str | None:
    """What the last softmax before a tensor was made of, if only steps that keep values lie between."""
    node = makers.get(name)
    while node is not None and node.op_type in KEEPING:
        node = makers.get(node.input[0])
    return node.input[0] if node is not None and node.op_type == "Softmax" else None


def _keep(graph: GraphProto, needed: set[str]) -> None:
    """Drop what is not needed, and what says nothing to a runtime: notes, stack traces, shapes of what is inside."""
    nodes = [node for node in graph.node if needed.intersection(node.output)]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    sparse = [tensor for tensor in graph.sparse_initializer if tensor.values.name in needed]
    for node in nodes:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for field, kept in (("node", nodes), ("initializer", weights), ("sparse_initializer", sparse)):
        graph.ClearField(field)
        getattr(graph, field).extend(kept)
    for field in ("input", "output", "value_info", "quantization_annotation", "metadata_props"):
        graph.ClearField(field)


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    """Tensors by new names; another one that already has such a name makes way."""
    taken = {name for node in graph.node for name in (*_used(node), *node.output)} | set(names.values())
    for name in sorted(set(names.values()) - set(names)):
        free = name
        while free in taken:
            free += "_"
        names[name] = free
    _apply(graph, names)


def _apply(graph: GraphProto, names: dict[str, str]) -> None:
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        tensor.name = names.get(tensor.name, tensor.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in _graphs(node):
            _apply(inner, names)
