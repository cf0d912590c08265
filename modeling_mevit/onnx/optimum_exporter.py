# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A graph becomes an ONNX file by Optimum's exporter. Needs the extra `mevit[optimum]`, and so Transformers 4.57."""

import copy
from pathlib import Path
from typing import Any

from optimum.exporters.onnx import export_models
from optimum.exporters.onnx.model_configs import ViTOnnxConfig

from .graphs import Axes, Graph
from .writer import OPSET, TRACED_BATCH, TRACED_QUERIES


class GraphOnnxConfig(ViTOnnxConfig):  # type: ignore[misc]
    """Optimum's config of a ViT, with the inputs and outputs of one of our graphs."""

    def __init__(self, graph: Graph):
        super().__init__(graph.module.config, task="image-classification")
        self._graph = graph

    @property
    def inputs(self) -> Axes:
        return self._graph.inputs

    @property
    def outputs(self) -> Axes:
        return self._graph.outputs

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        inputs = self._graph.noise(TRACED_BATCH, TRACED_QUERIES)
        return inputs if framework == "pt" else {name: value.numpy() for name, value in inputs.items()}


def write_graph_with_optimum(graph: Graph, file: Path) -> None:
    """Traces a graph with Optimum, and writes it."""
    graph.module.config = copy.deepcopy(graph.module.config)  # Optimum sets fields of it
    pairs = {file.name: (graph.module.eval(), GraphOnnxConfig(graph))}
    export_models(pairs, file.parent, opset=OPSET, output_names=[file.name])
