# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A model small enough to run in milliseconds."""

from typing import Any

import torch

from modeling_mevit import MEViTConfig, MEViTForImageClassification


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
    "exit_layers": [2, 3, 4],
}


def tiny_model(seed: int = 0, **settings: Any) -> MEViTForImageClassification:
    """A tiny model whose exits disagree: weights are ten times larger than the initial ones.

    Its predictor reads logits, which vary most, or probabilities where exits are combined.
    """
    torch.manual_seed(seed)
    uncertainty_input = "logits" if settings.get("exit_combination", "none") == "none" else "probabilities"
    settings = {**TINY, "uncertainty_input": uncertainty_input, **settings}
    model = MEViTForImageClassification(MEViTConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)  # initial weights take other numbers in other versions of torch
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def thirds_as_thresholds(model: MEViTForImageClassification, images: torch.Tensor) -> list[float]:
    """Thresholds midway between scores, under which about a third of the samples leaves at each early exit.

    Patience has few different scores: there, as many leave as agree so far, which may be all or none.
    """
    scores = model(images, early_exit=False).exit_scores[:, :-1].sort(dim=0).values
    third = len(scores) // 3
    return ((scores[third - 1] + scores[third]) / 2).tolist()
