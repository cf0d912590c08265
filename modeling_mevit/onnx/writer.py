# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A graph becomes an ONNX file: traced by PyTorch, and written tensor by tensor.

Protobuf makes two copies of all weights before it writes the first byte of a model. Written one after another, as it
would encode them, they need none.
"""

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir
import torch
from torch.export import Dim

from .graphs import Graph


OPSET = 18
TRACED_BATCH, TRACED_QUERIES = 3, 5  # 0 and 1 would be taken for constants
LARGEST_FILE = 2**31 - 1  # bytes, of a protobuf message; weights of a larger model are in a file beside it
SMALL = 2**20  # bytes; beside 2 GB of weights, what else a graph holds is less


def write_graph(graph: Graph, file: Path) -> None:
    """Traces a graph with `torch.onnx`, and writes it, with its weights in `FILE_data` where they take 2 GB."""
    model = trace(graph)
    if sum(tensor.nbytes for tensor in _weights(model).values()) > LARGEST_FILE - SMALL:
        onnx_ir.save(model, file, external_data=f"{file.name}_data")
    else:
        with file.open("wb") as opened:
            write_model(model, opened)


@torch.no_grad()
def trace(graph: Graph) -> onnx_ir.Model:
    """A graph as ONNX, without the stack traces and names of modules that PyTorch keeps in it."""
    sizes = {axis: Dim(axis) for axes in graph.inputs.values() for axis in axes.values()}
    dynamic = {name: {place: sizes[axis] for place, axis in axes.items()} for name, axes in graph.inputs.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*shares the same shape constraints with another axis")
        program = torch.onnx.export(
            graph.module.eval(),
            kwargs=graph.noise(TRACED_BATCH, TRACED_QUERIES),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    model: onnx_ir.Model = program.model
    nodes = list(model.graph.all_nodes())
    values = [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(out for node in nodes for out in node.outputs),
    ]
    parts: list[Any] = [model, model.graph, *nodes, *values]
    for part in parts:
        part.metadata_props.clear()
    return model


def write_model(model: onnx_ir.Model, file: BinaryIO) -> None:
    """Writes a model to a file, as protobuf does, but for the order of fields, and without a copy of its weights."""
    weights = _weights(model)
    model.graph.initializers.clear()
    proto = onnx_ir.to_proto(model)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    headers = []
    for name, tensor in weights.items():
        described = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
        data = _tag(onnx.TensorProto, "raw_data") + _varint(tensor.nbytes)
        header = described.SerializeToString() + data
        headers.append(_tag(onnx.GraphProto, "initializer") + _varint(len(header) + tensor.nbytes) + header)
    size = len(graph) + sum(
        len(header) + tensor.nbytes for header, tensor in zip(headers, weights.values(), strict=True)
    )
    file.write(proto.SerializeToString() + _tag(onnx.ModelProto, "graph") + _varint(size) + graph)
    for header, tensor in zip(headers, weights.values(), strict=True):
        file.write(header)
        file.write(tensor.tobytes())


def _weights(model: onnx_ir.Model) -> dict[str, onnx_ir.TensorProtocol]:
    return {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }


def _tag(message: Any, field: str) -> bytes:
    """What goes before the length of a field: its number, and that it has a length."""
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def _varint(number: int) -> bytes:
    """A whole number, seven bits a byte, the lowest ones first; all bytes but the last have the highest bit set."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])
