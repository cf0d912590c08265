# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from torch import nn

import compare_predictors
from modeling_mevit import MEViTConfig
from modeling_mevit.data.image_processing import image_processor_for
from modeling_mevit.loss_mevit import uncertainty_loss
from modeling_mevit.modeling_mevit import MEViTUncertaintyPredictor
from tests.helpers.images import write_colours
from tests.helpers.models import TINY, tiny_model


pytestmark = pytest.mark.one_major


@pytest.fixture
def given() -> compare_predictors.ExitStates:
    generator = torch.Generator().manual_seed(0)
    states, logits = torch.randn(200, 3, 32, generator=generator), 3 * torch.randn(200, 3, 5, generator=generator)
    return compare_predictors.ExitStates(states, logits, torch.randint(5, (200,), generator=generator))


@pytest.mark.parametrize("kind", compare_predictors.INPUTS)
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("target", compare_predictors.TARGETS)
def test_a_predictor_learns_its_target(given, kind, is_shared, target):
    wanted = compare_predictors.target_of(given.logits, given.labels, target)

    def loss_after(passes: int) -> float:
        predictor = compare_predictors.train_predictor(
            [given] * passes, kind, is_shared, target, std=0.02, learning_rate=1e-2, seed=0
        )
        assert predictor.weight.shape == (1 if is_shared else 3, 32 if kind == "hidden_state" else 5)
        return uncertainty_loss(predictor(given.states, given.logits), wanted).sum().item()

    assert loss_after(20) < 0.95 * loss_after(1)


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_what_the_library_has_is_one_of_them(given, kind):
    torch.manual_seed(0)
    ours = compare_predictors.Predictor(given, kind, is_shared=True, std=0.02)
    torch.manual_seed(0)
    library = MEViTUncertaintyPredictor(MEViTConfig(**TINY, uncertainty_input=kind))
    library.reset_parameters(0.02)
    assert isinstance(library, nn.Module) and ours.weight.equal(library.weight) and ours.bias.equal(library.bias)
    torch.testing.assert_close(ours(given.states, given.logits), library(given.logits))


@pytest.mark.slow
def test_compares_every_kind_on_test_images(tmp_path, capsys):
    colours = {f"LABEL_{label}": (50 * label, 0, 0) for label in range(5)}
    sizes = {"train": 8, "validation": 4, "test": 8}
    write_colours(tmp_path / "images", colours, sizes, deviation=250, shape=(16, 16))
    tiny_model().save_pretrained(tmp_path / "model")
    image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "model")
    output = tmp_path / "predictors.json"
    options = ["--data", str(tmp_path / "images"), "--seeds", "2", "--epochs", "1", "--output", str(output)]
    results = compare_predictors.main([str(tmp_path / "model"), *options])
    assert json.loads(output.read_text()) == results
    assert results["num_samples"] == {"train": 40, "validation": 20, "test": 40}
    variants = {(row["learned_on"], row["input"], row["shared"], row["target"]) for row in results["predictors"]}
    assert len(variants) == len(results["predictors"]) == 2 * 3 * 2 * 2
    row = results["predictors"][0]
    assert row["auroc"] == pytest.approx(np.mean([seed["mean"] for seed in row["seeds"]])) and 0 < row["auroc"] < 1
    assert "| confidence | – | – | – | 0." in capsys.readouterr().out
