# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What an exit costs: multiply-accumulates of the modules that really run, heads and predictors included.

The counter is PyTorch's own and runs on tensors without data, so that counting takes neither time nor memory.
"""

import copy
from collections.abc import Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..configuration_mevit import MEViTConfig
from ..modeling_mevit import MEViTForImageClassification
from ..vit_backbone_mevit import to_2tuple


def count_macs(model: PreTrainedModel, full_last_layer: bool = False) -> int:
    """Multiply-accumulates of one image of `model.config.image_size` through a model made by [`on_meta_device`].

    A [`MEViTForImageClassification`] computes its last layer for [CLS] alone, unless `full_last_layer`.
    """
    height, width = to_2tuple(model.config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        image = torch.empty(1, model.config.num_channels, height, width, device="meta")
        model(image, output_hidden_states=full_last_layer)  # which needs every layer in full
    return counter.get_total_flops() // 2


def on_meta_device(model_class: type[PreTrainedModel], config: ViTConfig) -> PreTrainedModel:
    """A model of shapes only, in eval mode, with eager attention, whose matrix products the counter sees."""
    settings = config.to_dict()
    settings.pop("model_type", None)
    # which path an image takes cannot be told without data, and layers whose states are asked for run in full
    settings |= {"early_exit": False, "output_hidden_states": False, "output_attentions": False}
    config = model_class.config_class(**settings, attn_implementation="eager")
    with torch.device("meta"):
        return model_class(config).eval()


def relative_cost(model_class: type[PreTrainedModel], config: ViTConfig, full_last_layer: bool = False) -> float:
    """Cost of any image classifier on a ViT, relative to the plain ViT of the same size and resolution.

    Its multiply-accumulates through those of [`ViTForImageClassification`]; `full_last_layer` as in
    [`count_macs`].
    """
    plain = count_macs(on_meta_device(ViTForImageClassification, config))
    return count_macs(on_meta_device(model_class, config), full_last_layer) / plain


def static_exit_costs(config: MEViTConfig, full_last_layer: bool = False) -> dict[int, float]:
    """Cost of the model cut at each exit, relative to the plain ViT of the same size and resolution.

    Where exits are combined, it has the exits before too, and their heads and predictions count.

    Args:
        config: of the model with all exits.
        full_last_layer: whether the exit's layer is counted for all tokens, as the paper counts it, where the model
            computes it for [CLS] alone.

    Returns:
        exit layer → multiply-accumulates of MEViT_k / multiply-accumulates of [`ViTForImageClassification`].
    """
    plain = count_macs(on_meta_device(ViTForImageClassification, config))
    model = on_meta_device(MEViTForImageClassification, config)
    return {layer: count_macs(model.truncate(layer), full_last_layer) / plain for layer in config.exit_layers}


def dynamic_exit_costs(config: MEViTConfig) -> dict[int, float]:
    """Cost of an image that leaves at each exit of an early-exit run, relative to the plain ViT.

    It is that of the model cut there, and of the exits that the image passed.

    Returns:
        exit layer → cost.
    """
    plain = count_macs(on_meta_device(ViTForImageClassification, config))
    costs = {}
    for place, layer in enumerate(config.exit_layers, start=1):
        prefix = copy.deepcopy(config)
        prefix.num_hidden_layers, prefix.exit_layers = layer, config.exit_layers[:place]
        prefix.exit_thresholds, prefix.calibration = None, None
        costs[layer] = count_macs(on_meta_device(MEViTForImageClassification, prefix)) / plain
    return costs


def mean_cost(exit_layer: Iterable[int], config: MEViTConfig) -> float:
    """Mean cost of an early-exit run.

    Args:
        exit_layer: (B,), the layer at which each image left, as the model returns it.
        config: of the model.

    Raises:
        ValueError: where there are no images.
    """
    costs = dynamic_exit_costs(config)
    layers = [int(layer) for layer in exit_layer]
    if not layers:
        raise ValueError("exit_layer is empty; a mean cost needs at least one image.")
    return sum(costs[layer] for layer in layers) / len(layers)


def exit_parameters(config: MEViTConfig) -> dict[int, int]:
    """Parameters of the model cut at each exit: exit layer → number of parameters of MEViT_k."""
    model = on_meta_device(MEViTForImageClassification, config)
    return {layer: model.truncate(layer).num_parameters() for layer in config.exit_layers}
