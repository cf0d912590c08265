# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTForImageClassification

from modeling_mevit import MEViTConfig
from modeling_mevit.early_exit.cost import (
    count_macs,
    dynamic_exit_costs,
    exit_parameters,
    mean_cost,
    on_meta_device,
    static_exit_costs,
)
from tests.helpers.models import TINY, thirds_as_thresholds, tiny_model


def test_a_layer_costs_what_the_closed_form_says():
    config = MEViTConfig(image_size=448, num_labels=200)
    tokens, width = 28 * 28 + 1, 768
    layer = 12 * width**2 * tokens + 2 * tokens**2 * width
    patches, head = 28 * 28 * 16 * 16 * 3 * width, width * 200
    counted = count_macs(on_meta_device(ViTForImageClassification, config))
    assert counted == 12 * layer + patches + head
    assert counted == pytest.approx(78.5e9, rel=1e-3)


@pytest.mark.parametrize(
    ("image_size", "cls_alone", "whole"),
    [(448, 0.432, 0.503), pytest.param(224, 0.434, 0.503, marks=pytest.mark.slow)],
)
def test_cost_of_the_exits_of_vit_base(image_size, cls_alone, whole):
    config = MEViTConfig(image_size=image_size, num_labels=200)
    costs = static_exit_costs(config)
    assert list(costs) == [6, 7, 8, 9, 10, 11, 12]
    assert costs[6] == pytest.approx(cls_alone, abs=5e-4)
    as_published = static_exit_costs(config, full_last_layer=True)
    assert as_published[6] == pytest.approx(whole, abs=5e-4)
    # the last exit is the plain ViT and a predictor
    assert as_published[12] == pytest.approx(1, abs=1e-6) and as_published[12] > 1


def test_the_last_layer_of_a_cut_model_costs_what_the_closed_form_says():
    config = MEViTConfig(image_size=448, num_labels=200)
    tokens, width = 28 * 28 + 1, 768
    plain = count_macs(on_meta_device(ViTForImageClassification, config))
    project_keys_values, cls_row = 2 * width**2 * tokens, 10 * width**2 + 2 * tokens * width
    rest_of_the_layer = 12 * width**2 * tokens + 2 * tokens**2 * width - project_keys_values - cls_row
    exit_12, as_published = static_exit_costs(config)[12], static_exit_costs(config, full_last_layer=True)[12]
    assert (as_published - exit_12) * plain == pytest.approx(rest_of_the_layer)


@pytest.mark.parametrize(
    "settings",
    [
        {"exit_combination": "none"},
        {"exit_combination": "mean"},
        {"exit_combination": "mean", "uncertainty_input": "logits", "exit_policy": "margin"},  # without a predictor
    ],
    ids=str,
)
def test_an_early_exit_run_costs_what_its_operations_add_up_to(settings):
    model = tiny_model(attn_implementation="eager", **settings)
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    thresholds = thirds_as_thresholds(model, images)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        exit_layer = model(images, early_exit=True, exit_thresholds=thresholds).exit_layer
    assert len(exit_layer.unique()) == 3
    plain = count_macs(on_meta_device(ViTForImageClassification, model.config))
    assert mean_cost(exit_layer, model.config) == pytest.approx(counter.get_total_flops() / 2 / plain / 32)


def test_who_leaves_late_pays_for_the_exits_passed():
    config = MEViTConfig(**TINY)
    plain = count_macs(on_meta_device(ViTForImageClassification, config))
    cut, run = static_exit_costs(config), dynamic_exit_costs(config)
    assert run[2] == cut[2]
    assert (run[4] - cut[4]) * plain == pytest.approx(2 * (32 * 5 + 5))  # two classifiers and predictions more


@pytest.mark.parametrize("policy", ["uncertainty", "margin", "patience"])
def test_who_combines_exits_pays_for_those_passed(policy):
    alone = MEViTConfig(**TINY, exit_policy=policy)
    combined = MEViTConfig(**TINY, exit_policy=policy, exit_combination="mean")
    plain = count_macs(on_meta_device(ViTForImageClassification, alone))
    head, prediction = 32 * 5, 5
    for full_last_layer in (False, True):
        costs = [static_exit_costs(config, full_last_layer) for config in (alone, combined)]
        for passed, layer in enumerate((2, 3, 4)):
            assert (costs[1][layer] - costs[0][layer]) * plain == pytest.approx(passed * (head + prediction))
    # an early-exit run has computed them anyway
    assert dynamic_exit_costs(combined) == dynamic_exit_costs(alone)
    parameters, more = exit_parameters(alone), exit_parameters(combined)
    head_and_norm = 32 * 5 + 5 + 2 * 32
    assert [more[layer] - parameters[layer] for layer in (2, 3, 4)] == [0, head_and_norm, 2 * head_and_norm]


def test_heads_and_predictors_are_counted():
    costs = {
        labels: count_macs(on_meta_device(ViTForImageClassification, MEViTConfig(**{**TINY, "num_labels": labels})))
        for labels in (5, 6)
    }
    assert costs[6] - costs[5] == 32
    plain, cost = costs[5], static_exit_costs(MEViTConfig(**TINY), full_last_layer=True)[4]
    assert cost * plain - plain == pytest.approx(5)


def test_images_need_not_be_square():
    costs = static_exit_costs(MEViTConfig(**{**TINY, "image_size": [16, 32]}))
    assert 0.3 < costs[2] < 0.4


def test_parameters_are_those_of_the_truncated_model():
    model = tiny_model()
    assert exit_parameters(model.config) == {
        layer: sum(parameter.numel() for parameter in model.truncate(layer).parameters()) for layer in (2, 3, 4)
    }


def test_what_a_config_asks_for_does_not_change_its_cost():
    plain, asking = MEViTConfig(**TINY), MEViTConfig(**TINY, output_hidden_states=True)
    asking.output_attentions = True
    assert static_exit_costs(asking) == static_exit_costs(plain)
    calibrated = MEViTConfig(**TINY, exit_thresholds=0.5, early_exit=True)
    assert dynamic_exit_costs(calibrated) == dynamic_exit_costs(plain)


def test_no_images_have_no_mean_cost():
    with pytest.raises(ValueError, match="exit_layer is empty; a mean cost needs at least one image"):
        mean_cost([], MEViTConfig(**TINY))


def test_counting_leaves_the_config_alone():
    config = MEViTConfig(**TINY)
    before = config.to_dict()
    static_exit_costs(config)
    assert config.to_dict() == before
