# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mevit.data import image_processor_for
from modeling_mevit.loss_mevit import uncertainty_loss, uncertainty_target
from tests.helpers.models import tiny_model
from training import compare_predictors


def test_a_predictor_learns_its_target():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    states, logits = torch.randn(200, 3, 32, generator=generator), 3 * torch.randn(200, 3, 5, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    given = compare_predictors.ExitStates(states, logits, labels)

    def loss_after(passes: int) -> float:
        predictor = compare_predictors.train_predictor(model.config, [given] * passes, learning_rate=1e-2, seed=0)
        return uncertainty_loss(predictor(states, logits), uncertainty_target(logits, labels)).sum().item()

    assert loss_after(20) < 0.9 * loss_after(1)


def test_compares_every_kind_on_test_photos(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in {"train": 8, "validation": 4, "test": 8}.items():
        for label in range(5):
            (tmp_path / "photos" / split / f"LABEL_{label}").mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / f"LABEL_{label}" / f"{number}.png")
    tiny_model().save_pretrained(tmp_path / "model")
    image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "model")
    output = tmp_path / "predictors.json"
    options = ["--data", str(tmp_path / "photos"), "--seeds", "2", "--epochs", "1", "--output", str(output)]
    results = compare_predictors.main([str(tmp_path / "model"), *options])
    assert json.loads(output.read_text()) == results
    assert results["photos"] == {"train": 40, "validation": 20, "test": 40}
    assert len(results["predictors"]) == 2 * 3 * 2 * 2
    row = results["predictors"][0]
    assert row["auroc"] == pytest.approx(np.mean([seed["mean"] for seed in row["seeds"]])) and 0 < row["auroc"] < 1
    assert "| confidence | – | – | – | 0." in capsys.readouterr().out
