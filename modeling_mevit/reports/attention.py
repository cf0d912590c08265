# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Where [CLS] looks in each layer, and how soon it looks where the last layer does."""

import numpy as np
import torch
from torch import Tensor

from ..modeling_mevit import MEViTForImageClassification
from ..vit_backbone_mevit import patch_grid


@torch.no_grad()
def cls_attention(model: MEViTForImageClassification, pixel_values: Tensor) -> np.ndarray:
    """Attention of [CLS] to the patches, mean over heads.

    Args:
        model: in eval mode, with `attn_implementation="eager"`.
        pixel_values: (B, C, H, W), as the image processor gives them.

    Returns:
        (B, layers, rows, columns), float32; a map sums to what [CLS] does not give to itself.

    Raises:
        ValueError: if the model has another implementation of attention, which keeps no probabilities.
    """
    attentions = model(pixel_values.to(model.device), output_attentions=True).attentions
    of_cls = torch.stack([attention[:, :, 0, 1:].float().mean(1) for attention in attentions], dim=1)
    maps: np.ndarray = of_cls.reshape(*of_cls.shape[:2], *patch_grid(model.config)).cpu().numpy()
    return maps


def similarity_to_last(maps: np.ndarray) -> np.ndarray:
    """Cosine similarity of each layer's map to the last layer's, mean over images.

    Args:
        maps: (B, layers, rows, columns), as [`cls_attention`] gives them.

    Returns:
        (layers,), in 0 … 1, the last one 1.
    """
    flat = maps.reshape(*maps.shape[:2], -1)
    flat = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    similarities: np.ndarray = (flat * flat[:, -1:]).sum(-1).mean(0)
    return similarities
