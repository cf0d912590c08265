# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from modeling_mevit.encoder_layer_mevit import (
    encoder_layers,
    layer_outputs,
    layer_parts,
    project_keys_values,
    recorded_attentions,
    runs_whole,
)
from tests.helpers.models import tiny_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_two_parts_make_the_layer(attention, qkv_bias):
    layer = encoder_layers(tiny_model(attn_implementation=attention, qkv_bias=qkv_bias).vit)[0]
    hidden_state = torch.randn(3, 17, 32)
    normed, keys, values = project_keys_values(layer, hidden_state)
    for queries in (slice(None), slice(0, 1), slice(1, None), [5, 2]):
        given = layer_outputs(layer, hidden_state[:, queries], normed[:, queries], keys, values)
        torch.testing.assert_close(given, layer(hidden_state)[:, queries], atol=1e-5, rtol=0)


def test_a_layer_runs_whole_while_something_waits_for_its_call(model):
    layer = encoder_layers(model.vit)[0]
    assert not runs_whole(layer)
    for module in (layer, layer_parts(layer).attention):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(lambda *args: None)
            assert runs_whole(layer)
            hook.remove()
        add_hook_to_module(module, ModelHook())
        assert runs_whole(layer)
        remove_hook_from_module(module)
    assert not runs_whole(layer)
    assert runs_whole(torch.nn.Sequential(layer))


def test_a_hook_on_what_both_parts_call_lets_a_layer_run_in_parts(model):
    layer = encoder_layers(model.vit)[0]
    layer.layernorm_before.register_forward_hook(lambda *args: None)
    add_hook_to_module(layer_parts(layer).query, ModelHook())
    assert not runs_whole(layer)


@torch.no_grad()
def test_attentions_of_other_threads_are_not_recorded():
    model = tiny_model(attn_implementation="eager")
    layers = encoder_layers(model.vit)
    state = torch.randn(2, 17, 32)

    @torch.no_grad()
    def run_all() -> None:
        for layer in layers:
            layer(state)

    with recorded_attentions(layers) as attentions, ThreadPoolExecutor(1) as other:
        other.submit(run_all).result()
        assert not attentions
        run_all()
    assert len(attentions) == 4 and not any(runs_whole(layer) for layer in layers)
