# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What is asserted of graphs in float16, whatever wrote them."""

import onnx


def assert_heads_alone_are_in_float32(model: onnx.ModelProto) -> None:
    """Asserts that a graph in float16 takes and gives float32, and has the norm and classifier of each exit in it."""
    graph, name_of = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph, onnx.TensorProto.DataType.Name
    types = {
        value.name: name_of(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    types |= {weight.name: name_of(weight.data_type) for weight in graph.initializer}

    def types_of(*nodes: onnx.NodeProto) -> set[str]:
        return {types[name] for node in nodes for name in (*node.input, *node.output)}

    assert {types[value.name] for value in (*graph.input, *graph.output)} == {"FLOAT"}
    classifiers = [node for node in graph.node if node.op_type == "Gemm"]
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    of_exits = [norm for norm in norms for node in classifiers if node.input[0] in norm.output]
    assert len(of_exits) == len(classifiers)
    assert all(".classifier.weight" in node.input[1] for node in classifiers)
    if classifiers:
        assert types_of(*classifiers, *of_exits) == {"FLOAT"}
    others = [norm for norm in norms if norm not in of_exits]
    assert types_of(*others, *(node for node in graph.node if node.op_type == "MatMul")) == {"FLOAT16"}
