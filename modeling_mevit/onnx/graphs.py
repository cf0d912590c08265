# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The graphs that are exported: modules that hold trained ones, each with its inputs and outputs.

One graph for a model cut at an exit: images in, logits and score out. And for the cascade two graphs for each exit
k, so that each weight lies in one of them only:

- stage: from what the exit before left (or from the images) through the layers in between, to the keys and values of
  layer k for all tokens;
- query: layer k's output for some query tokens, and the exit's logits and score from the first of them. It is run on
  [CLS] first, and then on the other tokens of the images that go on. Where exits are combined, it is also given what
  those passed before add up to.

B images, N tokens of width d, Q of them as queries, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..configuration_mevit import MEViTConfig
from ..early_exit.cost import dynamic_exit_costs
from ..encoder_layer_mevit import encoder_layers, layer_outputs, project_keys_values
from ..exit_policy_mevit import combine_exit, exit_scores
from ..modeling_mevit import MEViTForImageClassification
from ..vit_backbone_mevit import patch_grid, to_2tuple


BATCH = {0: "batch_size"}
BATCH_AND_QUERIES = {0: "batch_size", 1: "queries"}

Axes = dict[str, dict[int, str]]  # of each input or output, which dimensions may vary


@dataclass(frozen=True)
class GraphFile:
    """A file of an export, and what is in it: the model cut at an exit, or that exit's stage or query graph."""

    kind: Literal["exit", "stage", "query"]
    exit_layer: int
    name: str


def exit_file(exit_layer: int, exit_layers: list[int]) -> GraphFile:
    """The file of the model cut at an exit; the last exit's has the name that Optimum looks for by default."""
    is_last = exit_layer == exit_layers[-1]
    return GraphFile("exit", exit_layer, "model.onnx" if is_last else f"exit_{exit_layer}.onnx")


def cascade_files(exit_layer: int) -> tuple[GraphFile, GraphFile]:
    """An exit's stage and query graph."""
    return (
        GraphFile("stage", exit_layer, f"stage_{exit_layer}.onnx"),
        GraphFile("query", exit_layer, f"query_{exit_layer}.onnx"),
    )


def cascade_stages(config: MEViTConfig) -> list[dict[str, Any]]:
    """What cascade.json lists of each exit: `exit_layer`, the files `stage` and `query`, the exit policy whose `score`
    they give, and the `cost` of leaving."""
    costs = dynamic_exit_costs(config)
    stages = []
    for layer in config.exit_layers:
        stage, query = cascade_files(layer)
        graphs = {"stage": stage.name, "query": query.name, "score": config.exit_policy}
        stages.append({"exit_layer": layer, **graphs, "cost": costs[layer]})
    return stages


def cascade_description(config: MEViTConfig, precision: str = "float32", target: str | None = None) -> dict[str, Any]:
    """What `cascade.json` holds: the graphs. The runtime finds the rest in the model's and the processor's config.

    Args:
        config: of the model.
        precision: that the export is made for.
        target: processor that int8 files are made for.
    """
    return {"precision": precision, "target": target, "stages": cascade_stages(config)}


@dataclass(frozen=True)
class Graph:
    """Something to export.

    Args:
        module: in eval mode; called with the inputs by name, it returns the outputs by name, in this order.
        inputs: their dynamic axes.
        outputs: their dynamic axes.
        noise: makes inputs, by name, from a batch size and a number of query tokens, which query graphs alone have.
        num_queries: the largest number of query tokens in a run.
    """

    module: nn.Module
    inputs: Axes
    outputs: Axes
    noise: Callable[[int, int], dict[str, Tensor]]
    num_queries: int = 1


def build_graph(model: MEViTForImageClassification, file: GraphFile) -> Graph:
    """What a file of an export holds, from the trained model, whose weights it shares or copies."""
    return {"exit": _exit_graph, "stage": _stage_graph, "query": _query_graph}[file.kind](model, file.exit_layer)


def plain_graph(model: MEViTForImageClassification) -> Graph:
    """The plain ViT that the model's last exit is: `pixel_values` (B, C, H, W) → `logits` (B, L)."""
    return Graph(PlainModule(model), {"pixel_values": BATCH}, {"logits": BATCH}, _images(model.config))


def _exit_graph(model: MEViTForImageClassification, exit_layer: int) -> Graph:
    """`pixel_values` (B, C, H, W) → `logits` (B, L) and, unless the policy is patience, `score` (B,)."""
    module = ExitModule(model, exit_layer)
    return Graph(module, {"pixel_values": BATCH}, _answers(model.config), _images(model.config))


def _stage_graph(model: MEViTForImageClassification, exit_layer: int) -> Graph:
    """`pixel_values`, or `previous` (B, N, d), that the exit before left → what the exit's layer needs.

    Outputs: `normed` (B, N, d), the input of the exit's layer after its norm; `keys` and `values` (B, H, N, d/H); and
    `hidden_state` (B, N, d), that input before its norm, unless it is `previous` itself (neighbouring exits).
    """
    config, module = model.config, StageModule(model, exit_layer)
    outputs = {name: BATCH for name in ("normed", "keys", "values")}
    if module.changes_state:
        outputs = {"hidden_state": BATCH, **outputs}
    if module.embeddings is not None:
        return Graph(module, {"pixel_values": BATCH}, outputs, _images(config))

    def noise(batch: int, queries: int) -> dict[str, Tensor]:
        return {"previous": torch.randn(batch, _num_tokens(config), config.hidden_size)}

    return Graph(module, {"previous": BATCH}, outputs, noise)


def _query_graph(model: MEViTForImageClassification, exit_layer: int) -> Graph:
    """`hidden_queries` and `normed_queries` (B, Q, d), `keys` and `values` (B, H, N, d/H) → `outputs` (B, Q, d).

    And `logits` (B, L) and, unless the policy is patience, `score` (B,) of the exit, which are meaningful where the
    first query is [CLS].

    Where exits are combined, `previous_sum` (B, L) is given too, the sum of the log-probabilities of the exits passed
    before, zeros at the first; `logits` and `score` are then those of the combination, followed by the sum with this
    exit, `log_probability_sum` (B, L), and the exit's own logits, `exit_logits` (B, L).
    """
    config = model.config
    tokens, heads = _num_tokens(config), config.num_attention_heads
    inputs = {"hidden_queries": BATCH_AND_QUERIES, "normed_queries": BATCH_AND_QUERIES, "keys": BATCH, "values": BATCH}
    outputs = {"outputs": BATCH_AND_QUERIES, **_answers(config)}
    if config.exit_combination != "none":
        inputs["previous_sum"] = outputs["log_probability_sum"] = outputs["exit_logits"] = BATCH

    def noise(batch: int, queries: int) -> dict[str, Tensor]:
        of_queries = {
            name: torch.randn(batch, queries, config.hidden_size) for name in ("hidden_queries", "normed_queries")
        }
        of_tokens = {
            name: torch.randn(batch, heads, tokens, config.hidden_size // heads) for name in ("keys", "values")
        }
        passed = {"previous_sum": torch.randn(batch, config.num_labels).log_softmax(-1)}
        return {**of_queries, **of_tokens, **(passed if "previous_sum" in inputs else {})}

    return Graph(QueryModule(model, exit_layer), inputs, outputs, noise, num_queries=tokens)


class PlainModule(nn.Module):
    """The plain ViT."""

    def __init__(self, model: MEViTForImageClassification):
        super().__init__()
        self.config = model.config
        self.model = model.to_vit()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(pixel_values).logits}


class ExitModule(nn.Module):
    """The model cut at an exit."""

    def __init__(self, model: MEViTForImageClassification, exit_layer: int):
        super().__init__()
        self.config = model.config
        self.model = model.truncate(exit_layer, copy=False)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        outputs = self.model(pixel_values, early_exit=False)
        answers = {"logits": outputs.logits}
        if _has_score(self.config):
            answers["score"] = outputs.exit_scores[:, -1]
        return answers


class StageModule(nn.Module):
    """The layers from one exit to the next, without what the next one's query graph computes."""

    def __init__(self, model: MEViTForImageClassification, exit_layer: int):
        super().__init__()
        self.config = model.config
        place = model.config.exit_layers.index(exit_layer)
        start = model.config.exit_layers[place - 1] if place else 0
        layers = encoder_layers(model.vit)
        self.embeddings = None if place else model.vit.embeddings
        self.layers = layers[start : exit_layer - 1]
        self.exit_layer = layers[exit_layer - 1]
        self.changes_state = self.embeddings is not None or len(self.layers) > 0

    def forward(self, previous: Tensor | None = None, pixel_values: Tensor | None = None) -> dict[str, Tensor]:
        hidden_state: Any = previous if self.embeddings is None else self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_state = layer(hidden_state)
        normed, keys, values = project_keys_values(self.exit_layer, hidden_state)
        outputs = {"normed": normed, "keys": keys, "values": values}
        return {"hidden_state": hidden_state, **outputs} if self.changes_state else outputs


class QueryModule(nn.Module):
    """An exit's layer for some of its tokens, and the exit."""

    def __init__(self, model: MEViTForImageClassification, exit_layer: int):
        super().__init__()
        self.config = model.config
        self.layer = encoder_layers(model.vit)[exit_layer - 1]
        # the last exit's own norm does nothing, since the backbone's final norm is applied before
        is_last = exit_layer == model.config.num_hidden_layers
        self.norm = model.vit.layernorm if is_last else nn.Identity()
        self.exit = model.exits[str(exit_layer)]
        self.uncertainty = model.uncertainty
        self.num_exits = model.config.exit_layers.index(exit_layer) + 1  # passed, with this one

    def forward(
        self,
        hidden_queries: Tensor,
        normed_queries: Tensor,
        keys: Tensor,
        values: Tensor,
        previous_sum: Tensor | None = None,
    ) -> dict[str, Tensor]:
        outputs = layer_outputs(self.layer, hidden_queries, normed_queries, keys, values)
        logits = exit_logits = self.exit(self.norm(outputs[:, 0]))
        combined = {}
        if previous_sum is not None:
            combination = self.config.exit_combination
            logits, log_probability_sum = combine_exit(combination, exit_logits, previous_sum, self.num_exits)
            combined = {"log_probability_sum": log_probability_sum, "exit_logits": exit_logits}
        answers = {"outputs": outputs, "logits": logits}
        if _has_score(self.config):
            predicted = logits[:, None]
            answers["score"] = exit_scores(self.config.exit_policy, predicted, self.uncertainty(predicted))[:, 0]
        return {**answers, **combined}


def _has_score(config: MEViTConfig) -> bool:
    """Whether one exit gives the score; patience counts exits, and who runs them has to count."""
    return bool(config.exit_policy != "patience")


def _answers(config: MEViTConfig) -> Axes:
    return {"logits": BATCH, "score": BATCH} if _has_score(config) else {"logits": BATCH}


def _num_tokens(config: MEViTConfig) -> int:
    rows, columns = patch_grid(config)
    return rows * columns + 1


def _images(config: MEViTConfig) -> Callable[[int, int], dict[str, Tensor]]:
    shape = (config.num_channels, *to_2tuple(config.image_size))
    return lambda batch, queries: {"pixel_values": torch.randn(batch, *shape)}
