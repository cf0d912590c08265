# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
from huggingface_hub import ModelCard

from modeling_mevit.reports.model_card import model_card, with_section


METRICS = {
    "num_samples": {"train": 2640, "validation": 296, "test": 2485},
    "exits": [
        {"exit": 6, "validation_accuracy": 0.5, "test_accuracy": 0.61, "cost": 0.505, "parameters": 10_930_339},
        {"exit": 12, "validation_accuracy": 0.525, "test_accuracy": 0.6251, "cost": 1.0, "parameters": 21_600_000},
    ],
}


def card(**changes) -> ModelCard:
    settings = {
        "model_name": "org/mevit-grocery",
        "dataset": "someone/Grocery",
        "dataset_on_hub": True,
        "base_model": "google/vit-base-patch16-224-in21k",
        "base_model_on_hub": True,
        "num_labels": 81,
        "metrics": METRICS,
        "recipe": {"learning_rate": 0.0001, "seed": 0},
        "curve": "training_curve.png",
    }
    return model_card(**{**settings, **changes})


def test_says_data_recipe_results_and_how_to_load():
    text = card().content
    assert "after encoder layers\n6, 12, trained on someone/Grocery (81 classes)" in text
    assert "| 6 | 50.0% | 61.0% | 0.505 | 10.9 M |" in text
    assert "| 12 | 52.5% | 62.5% | 1.000 | 21.6 M |" in text
    assert "2,640 train, 296 validation, 2,485 test images), from google/vit-base-patch16-224-in21k." in text
    assert "| learning_rate | 0.0001 |" in text
    assert 'from_pretrained("org/mevit-grocery", trust_remote_code=True)' in text
    assert "![Training loss and validation accuracy](training_curve.png)" in text
    assert "{" not in text


def test_metadata_is_what_the_hub_reads(tmp_path):
    card().save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert data.datasets == ["someone/Grocery"]
    assert data.base_model == "google/vit-base-patch16-224-in21k"
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results == {"Accuracy of exit 6": 0.61, "Accuracy of exit 12": 0.6251}


@pytest.mark.parametrize("name", ["my photos", "colours"])
def test_what_is_not_on_the_hub_is_not_linked(name):
    text = card(dataset=name, dataset_on_hub=False, base_model=None, base_model_on_hub=False)
    assert text.data.datasets is None and text.data.base_model is None
    assert f"Trained on {name} (" in text.content and "from random weights." in text.content


def test_a_section_replaces_its_own_kind_alone():
    text = "# Mine\n\n### Early exit\n\nmy words\n\n## How to load it\n\nso\n"
    once = with_section(text, "## Early exit", "## Early exit\n\nours\n")
    assert once == "# Mine\n\n### Early exit\n\nmy words\n\n## Early exit\n\nours\n\n## How to load it\n\nso\n"
    assert with_section(once, "## Early exit", "## Early exit\n\nnew\n") == once.replace("ours", "new")
    assert with_section(once, "## Early exit", None) == text
