# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
from transformers import ViTForImageClassification

from modeling_mevit import MEViTConfig
from modeling_mevit.cost import exit_costs, exit_parameters, multiply_accumulates, without_data
from tests.tiny import TINY, tiny_model


def test_a_layer_costs_what_the_closed_form_says():
    config = MEViTConfig(image_size=448, num_labels=200)
    tokens, width = 28 * 28 + 1, 768
    layer = 12 * width**2 * tokens + 2 * tokens**2 * width
    patches, head = 28 * 28 * 16 * 16 * 3 * width, width * 200
    counted = multiply_accumulates(without_data(ViTForImageClassification, config))
    assert counted == 12 * layer + patches + head
    assert counted == pytest.approx(78.5e9, rel=1e-3)


def test_cost_of_the_exits_of_vit_base_at_448_pixels():
    costs = exit_costs(MEViTConfig(image_size=448, num_labels=200))
    assert list(costs) == [6, 7, 8, 9, 10, 11, 12]
    assert costs[6] == pytest.approx(0.503, abs=5e-4)
    # the last exit is the plain ViT and a predictor
    assert costs[12] == pytest.approx(1, abs=1e-6) and costs[12] > 1


def test_heads_and_predictors_are_counted():
    costs = {
        labels: multiply_accumulates(
            without_data(ViTForImageClassification, MEViTConfig(**{**TINY, "num_labels": labels}))
        )
        for labels in (5, 6)
    }
    assert costs[6] - costs[5] == 32
    plain, cost = costs[5], exit_costs(MEViTConfig(**TINY))[4]
    assert cost * plain - plain == pytest.approx(5)


def test_pictures_need_not_be_square():
    costs = exit_costs(MEViTConfig(**{**TINY, "image_size": [16, 32]}))
    assert 0.5 < costs[2] < 0.6


def test_parameters_are_those_of_the_truncated_model():
    model = tiny_model()
    assert exit_parameters(model.config) == {
        layer: sum(parameter.numel() for parameter in model.truncate(layer).parameters()) for layer in (2, 3, 4)
    }


def test_counting_leaves_the_config_alone():
    config = MEViTConfig(**TINY)
    before = config.to_dict()
    exit_costs(config)
    assert config.to_dict() == before
