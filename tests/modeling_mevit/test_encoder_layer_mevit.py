# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from modeling_mevit.encoder_layer_mevit import encoder_layers, project_keys_values, layer_outputs
from tests.helpers.models import tiny_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_two_parts_make_the_layer(attention, qkv_bias):
    layer = encoder_layers(tiny_model(attn_implementation=attention, qkv_bias=qkv_bias).vit)[0]
    hidden_state = torch.randn(3, 17, 32)
    normed, keys, values = project_keys_values(layer, hidden_state)
    for rows in (slice(None), slice(0, 1), slice(1, None), [5, 2]):
        given = layer_outputs(layer, hidden_state[:, rows], normed[:, rows], keys, values)
        torch.testing.assert_close(given, layer(hidden_state)[:, rows], atol=1e-5, rtol=0)
