# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from modeling_mevit.reports.attention import cls_attention, similarity_to_last
from tests.helpers.models import tiny_model


def test_maps_are_the_row_of_cls(pixel_values):
    model = tiny_model(attn_implementation="eager")
    maps = cls_attention(model, pixel_values)
    assert maps.shape == (6, 4, 4, 4)
    attentions = model(pixel_values, output_attentions=True).attentions
    for layer, attention in enumerate(attentions):
        for row in range(4):
            for column in range(4):
                by_hand = attention[2, :, 0, 1 + 4 * row + column].mean().item()
                assert maps[2, layer, row, column] == pytest.approx(by_hand, abs=1e-6)
    by_column = torch.stack([attention[:, :, 1:, 0].mean(1) for attention in attentions], dim=1)
    assert not np.allclose(maps.reshape(6, 4, 16), by_column.detach().numpy())


def test_other_attention_is_refused(pixel_values):
    with pytest.raises(ValueError, match="needs attn_implementation='eager'"):
        cls_attention(tiny_model(attn_implementation="sdpa"), pixel_values)


def test_similarity_by_hand():
    last = np.array([[3.0, 0.0], [4.0, 0.0]])
    same, half, none = 2 * last, np.array([[3.0, 5.0], [4.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])
    maps = np.stack([[none, half, last], [same, half, last]])  # (2 images, 3 layers, 2, 2)
    assert similarity_to_last(maps) == pytest.approx([0.5, 1 / np.sqrt(2), 1])
