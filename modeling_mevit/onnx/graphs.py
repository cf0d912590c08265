# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The graphs that are exported, as modules around the trained ones, each with its Optimum config.

One graph for a model cut at an exit: images in, logits and score out. And for the cascade two graphs for each exit
k, so that each weight lies in one graph only:

- stage: from what the exit before left (or from the images) through the layers in between, to the keys and values of
  layer k for all tokens;
- rows: layer k's output for some rows of tokens, and the exit's logits and score from the first of them. It is run on
  [CLS] first, and then on the other tokens of the images that go on.

B images, N tokens of width d, R of them as rows, H heads.
"""

import copy
from collections.abc import Sequence

import torch
from optimum.exporters.onnx.model_configs import ViTOnnxConfig
from torch import Tensor, nn

from ..data import height_and_width
from ..encoder_layer_mevit import encoder_layers, project_keys_values, layer_outputs
from ..exit_policy_mevit import SCORES, exit_scores
from ..modeling_mevit import MEViTForImageClassification, patch_grid


DUMMY_BATCH = 3


def file_of_exit(exit_layer: int, exit_layers: list[int]) -> str:
    """Name of the file of the model cut at an exit; the last exit's is what Optimum looks for by default."""
    return "model.onnx" if exit_layer == exit_layers[-1] else f"exit_{exit_layer}.onnx"


class Graph(nn.Module):
    """Something to export: its inputs and outputs with their dynamic axes, and inputs to trace and compare it with."""

    def __init__(self, model: MEViTForImageClassification):
        super().__init__()
        self.config = copy.deepcopy(model.config)  # exporting sets fields of it
        self.has_score = model.config.exit_policy in SCORES
        rows, columns = patch_grid(model.config)
        self.tokens = rows * columns + 1

    @property
    def axes_of_inputs(self) -> dict[str, dict[int, str]]:
        raise NotImplementedError

    @property
    def axes_of_outputs(self) -> dict[str, dict[int, str]]:
        raise NotImplementedError

    def dummy_inputs(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def onnx_config(self) -> "GraphOnnxConfig":
        return GraphOnnxConfig(self)

    def _images(self) -> Tensor:
        return torch.randn(DUMMY_BATCH, self.config.num_channels, *height_and_width(self.config.image_size))

    def _states(self, tokens: int) -> Tensor:
        return torch.randn(DUMMY_BATCH, tokens, self.config.hidden_size)

    def _heads(self) -> Tensor:
        heads = self.config.num_attention_heads
        return torch.randn(DUMMY_BATCH, heads, self.tokens, self.config.hidden_size // heads)

    def _answers(self) -> dict[str, dict[int, str]]:
        batch = {0: "batch_size"}
        return {"logits": batch, "score": batch} if self.has_score else {"logits": batch}


class GraphOnnxConfig(ViTOnnxConfig):
    """Optimum's config of a ViT, with the inputs and outputs of one of our graphs."""

    def __init__(self, graph: Graph):
        super().__init__(graph.config, task="image-classification")
        self._graph = graph

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return self._graph.axes_of_inputs

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self._graph.axes_of_outputs

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs) -> dict:
        inputs = self._graph.dummy_inputs()
        return inputs if framework == "pt" else {name: value.numpy() for name, value in inputs.items()}


class ExitGraph(Graph):
    """The model cut at an exit: `pixel_values` (B, C, H, W) → `logits` (B, L) and, for some policies, `score` (B,)."""

    def __init__(self, model: MEViTForImageClassification, exit_layer: int):
        super().__init__(model)
        self.model = model.truncate(exit_layer)

    @property
    def axes_of_inputs(self) -> dict[str, dict[int, str]]:
        return {"pixel_values": {0: "batch_size"}}

    @property
    def axes_of_outputs(self) -> dict[str, dict[int, str]]:
        return self._answers()

    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": self._images()}

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        outputs = self.model(pixel_values, early_exit=False)
        answers = {"logits": outputs.logits}
        if self.has_score:
            answers["score"] = outputs.exit_scores[:, 0]
        return answers


class StageGraph(Graph):
    """Layers from one exit to the next: `previous` (B, N, d), or `pixel_values`, → what the exit's layer needs.

    Outputs: `normed` (B, N, d), the input of the exit's layer after its norm; `keys` and `values` (B, H, N, d/H); and
    `hidden_state` (B, N, d), that input before its norm, unless it is `previous` itself (neighbouring exits).
    """

    def __init__(self, model: MEViTForImageClassification, exit_layer: int):
        super().__init__(model)
        exit_layers = model.config.exit_layers
        place = exit_layers.index(exit_layer)
        start = exit_layers[place - 1] if place else 0
        self.embeddings = None if place else model.vit.embeddings
        layers: Sequence[nn.Module] = encoder_layers(model.vit)
        self.layers = nn.ModuleList(layers[start : exit_layer - 1])
        self.exit_layer = layers[exit_layer - 1]
        self.changes_state = self.embeddings is not None or len(self.layers) > 0

    @property
    def axes_of_inputs(self) -> dict[str, dict[int, str]]:
        return {"previous" if self.embeddings is None else "pixel_values": {0: "batch_size"}}

    @property
    def axes_of_outputs(self) -> dict[str, dict[int, str]]:
        names = ("hidden_state", "normed", "keys", "values") if self.changes_state else ("normed", "keys", "values")
        return {name: {0: "batch_size"} for name in names}

    def dummy_inputs(self) -> dict[str, Tensor]:
        if self.embeddings is None:
            return {"previous": self._states(self.tokens)}
        return {"pixel_values": self._images()}

    def forward(self, previous: Tensor | None = None, pixel_values: Tensor | None = None) -> dict[str, Tensor]:
        hidden_state = previous if self.embeddings is None else self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_state = layer(hidden_state)
        normed, keys, values = project_keys_values(self.exit_layer, hidden_state)
        outputs = {"normed": normed, "keys": keys, "values": values}
        return {"hidden_state": hidden_state, **outputs} if self.changes_state else outputs


class QueryGraph(Graph):
    """An exit's layer for R of its tokens: `hidden_rows` and `normed_rows` (B, R, d), `keys` and `values` → `rows`.

    Outputs: `rows` (B, R, d), and `logits` (B, L) and `score` (B,) of the exit, which mean something where the first
    row is [CLS].
    """

    def __init__(self, model: MEViTForImageClassification, exit_layer: int):
        super().__init__(model)
        self.number = exit_layer
        self.layer = encoder_layers(model.vit)[exit_layer - 1]
        cut = model.truncate(exit_layer)
        self.norm, self.exit, self.uncertainty = cut.vit.layernorm, cut.exits[str(exit_layer)], cut.uncertainty

    @property
    def axes_of_inputs(self) -> dict[str, dict[int, str]]:
        rows = {0: "batch_size", 1: "rows"}
        return {"hidden_rows": rows, "normed_rows": rows, "keys": {0: "batch_size"}, "values": {0: "batch_size"}}

    @property
    def axes_of_outputs(self) -> dict[str, dict[int, str]]:
        return {"rows": {0: "batch_size", 1: "rows"}, **self._answers()}

    def dummy_inputs(self) -> dict[str, Tensor]:
        rows = self.tokens - 1
        states = {"hidden_rows": self._states(rows), "normed_rows": self._states(rows)}
        return {**states, "keys": self._heads(), "values": self._heads()}

    def forward(self, hidden_rows: Tensor, normed_rows: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        rows = layer_outputs(self.layer, hidden_rows, normed_rows, keys, values)
        state, logits = self.exit(self.norm(rows[:, 0]))
        answers = {"rows": rows, "logits": logits}
        if self.has_score:
            uncertainty = self.uncertainty(state[:, None], logits[:, None])
            answers["score"] = exit_scores(self.config.exit_policy, logits[:, None], uncertainty)[:, 0]
        return answers
