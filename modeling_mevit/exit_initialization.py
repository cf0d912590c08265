# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A start for new exits that depends on the data: what each classifier reads is standardised over some images.

In a pretrained ViT, [CLS] states of different images have most of their length in common, and what tells images
apart is a small deviation from it. A new classifier sees little more than the common part, learns slowly, and until it
has learned, its gradient moves the backbone in directions that mean nothing. The norm before the classifier has a
weight and a bias for each feature, so it can subtract the mean and divide by the deviation from the first step on
(data-dependent initialisation; Krähenbühl, Doersch, Donahue and Darrell, ICLR 2016).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling_mevit import MEViTForImageClassification


SMALLEST_DEVIATION = 1e-4  # of a feature of a normalised state; what varies less is left small


@torch.no_grad()
def standardize_exits(model: MEViTForImageClassification, batches: Iterable[Tensor]) -> None:
    """Sets the norm of every exit so that each feature its classifier reads has mean 0 and deviation 1.

    A last exit that starts with the checkpoint's classifier is left as it is: that has learned what its norm gives.

    Args:
        model: whose norms are set, in place.
        batches: images (B, C, H, W), at least two in all.

    Raises:
        ValueError: if there are fewer than two images.
    """
    was_training = model.training
    model.eval()
    config = model.config
    of_batches = []
    for pixel_values in batches:
        hidden_states = model(pixel_values, output_hidden_states=True).hidden_states  # the embeddings come first
        of_batches.append(
            torch.stack([hidden_states[layer][:, 0].float() for layer in config.exit_layers])
        )  # (E, B, d)
    model.train(was_training)
    states = torch.cat(of_batches, dim=1) if of_batches else torch.empty(1, 0, config.hidden_size)
    if states.shape[1] < 2:
        raise ValueError(f"at least two images are needed to standardise exits, got {states.shape[1]}")
    normalised = F.layer_norm(states, states.shape[-1:], eps=config.layer_norm_eps)
    deviations, means = torch.std_mean(normalised, dim=1)  # (E, d)
    for layer, deviation, mean in zip(config.exit_layers, deviations, means, strict=True):
        is_last = layer == config.num_hidden_layers
        if is_last and model.starts_with_classifier:
            continue
        norm: Any = model.vit.layernorm if is_last else model.exits[str(layer)].norm
        deviation = deviation.clamp_min(SMALLEST_DEVIATION)
        norm.weight.copy_(1 / deviation)
        norm.bias.copy_(-mean / deviation)
