# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What an exit costs: multiply-accumulates of the modules that really run, heads and predictors included.

The counter is PyTorch's own and runs on tensors without data, so that counting takes neither time nor memory.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from .configuration_mevit import MEViTConfig
from .modeling_mevit import MEViTForImageClassification


def multiply_accumulates(model: PreTrainedModel) -> int:
    """Multiply-accumulates of one picture of `model.config.image_size` through a model made by [`without_data`]."""
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, model.config.num_channels, height, width, device="meta"))
    return counter.get_total_flops() // 2


def without_data(model_class: type[PreTrainedModel], config: ViTConfig) -> PreTrainedModel:
    """A model of shapes only, in eval mode, with eager attention, whose matrix products the counter sees."""
    settings = config.to_dict()
    settings.pop("model_type", None)
    config = model_class.config_class(**settings, attn_implementation="eager")
    with torch.device("meta"):
        return model_class(config).eval()


def exit_costs(config: MEViTConfig) -> dict[int, float]:
    """Cost of the model cut at each exit, relative to the plain ViT of the same size and resolution.

    Returns:
        exit layer → multiply-accumulates of MEViT_k / multiply-accumulates of [`ViTForImageClassification`].
    """
    plain = multiply_accumulates(without_data(ViTForImageClassification, config))
    model = without_data(MEViTForImageClassification, config)
    return {layer: multiply_accumulates(model.truncate(layer)) / plain for layer in config.exit_layers}


def exit_parameters(config: MEViTConfig) -> dict[int, int]:
    """Parameters of the model cut at each exit: exit layer → number of parameters of MEViT_k."""
    model = without_data(MEViTForImageClassification, config)
    return {layer: model.truncate(layer).num_parameters() for layer in config.exit_layers}
