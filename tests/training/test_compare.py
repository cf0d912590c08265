# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole comparison, on a folder of colours and models of milliseconds."""

import json

import numpy as np
import pytest
import yaml

from tests.helpers.images import write_colours
from tests.training.test_train import COLOURS, SETTINGS
from training import compare


MODELS = {
    "vit": {"seeds": [0, 1], "options": {"exit_layers": [3], "uncertainty_weight": 0}},
    "mevit": {"seeds": [0, 1]},
    "transfg": {
        "seeds": [0],
        "options": {
            "architecture": "transfg",
            "model_config": {**SETTINGS["model_config"], "patch_stride": 3},
        },
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compare")
    write_colours(
        directory / "colours", COLOURS, {"train": 12, "validation": 4, "test": 6}, deviation=250, shape=(22, 26)
    )
    recipe = {**SETTINGS, "num_train_epochs": 1, "dataset": str(directory / "colours")}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "recipe": str(directory / "recipe.yaml"),
        "models": MODELS,
        "output_dir": str(directory / "runs"),
        "latency_rounds": 2,
        "shown_images": 2,
    }
    (directory / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return directory


@pytest.fixture(scope="module")
def results(directory):
    return compare.main([str(directory / "compare.yaml")])


def test_every_model_and_exit_is_in_the_table(results, directory):
    table = (directory / "runs/comparison/table.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert names[:8] == ["model", "---", "plain ViT", "MEViT_1", "MEViT_2", "MEViT_3", "TransFG", "ViT-B/16 at 448 px"]
    assert "| TransFG | 5.71 | 1.78 |" in table
    assert "| MEViT_6 | 0.50 | 0.43 |" in table
    assert results["cost"]["mevit_1"]["here"] < results["cost"]["mevit_1"]["published"] < 1
    assert results["latency"]["ratio"]["vit"] == 1
    assert len(results["attention_similarity"]) == 3


def test_accuracies_are_those_of_the_runs(results, directory):
    for model, rows in results["accuracy"].items():
        for seed in range(len(rows[0]["seeds"])):
            metrics = json.loads((directory / f"runs/{model}-seed{seed}/metrics.json").read_text())
            measured = [row["test_accuracy"] for row in metrics["exits"]]
            assert [row["seeds"][seed] for row in rows] == pytest.approx(measured)


def test_class_changes_are_the_mean_over_seeds(results, directory):
    changes = []
    for seed in (0, 1):
        file = json.loads((directory / f"runs/mevit-seed{seed}/test_predictions.json").read_text())
        labels, predictions = np.array(file["labels"]), np.array(file["predictions"])
        right = predictions == labels[:, None]
        changes.append([(right[labels == c, 0].mean() - right[labels == c, -1].mean()) for c in range(3)])
    assert results["class_changes"] == pytest.approx(np.mean(changes, axis=0).tolist())


def test_early_exit_curve_is_that_of_thresholds_from_validation(results):
    for curve in results["early_exit"]:
        assert [point["budget"] for point in curve] == pytest.approx(compare.BUDGETS.tolist())
        assert all(0.1 < point["cost"] <= 0.8 and 0 <= point["accuracy"] <= 1 for point in curve)


def test_nothing_is_done_twice(results, directory, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("done again")

    for name in ("early_exit_curve", "latencies", "attention", "costs"):
        monkeypatch.setattr(compare, name, never)
    monkeypatch.setattr(compare.train, "run", never)
    assert compare.main([str(directory / "compare.yaml")])["accuracy"] == results["accuracy"]


def test_what_is_missing_or_depends_on_something_else_is_measured_anew(results, directory, monkeypatch):
    report = directory / "runs/comparison"
    (report / "cost.json").rename(report / "cost.partial")  # interrupted
    (report / "attention.png").unlink()
    measured = []
    for name in ("costs", "attention", "latencies", "early_exit_curve"):
        original = getattr(compare, name)
        monkeypatch.setattr(
            compare, name, lambda *args, n=name, original=original: (measured.append(n), original(*args))[1]
        )
    again = compare.main([str(directory / "compare.yaml"), "--policy", "margin"])
    assert sorted(measured) == ["attention", "costs", "early_exit_curve", "early_exit_curve"]
    assert again["cost"] == results["cost"] and (report / "attention.png").is_file()


def test_a_run_of_another_recipe_is_refused(results, directory):
    with pytest.raises(ValueError, match="vit-seed0 was trained with learning_rate=0.003, and 0.01 is asked for"):
        compare.main([str(directory / "compare.yaml"), "--learning_rate", "0.01"])
    models = {**MODELS, "mevit": {"seeds": [0], "options": {"distillation_weight": 0.5}}}
    with pytest.raises(ValueError, match="mevit-seed0 was trained with distillation_weight=1.0, and 0.5 is asked for"):
        compare.main([str(directory / "compare.yaml"), "--models", json.dumps(models)])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"mevit": {"seeds": [0]}}, "lack 'vit', which the others are compared with"),
        ({**MODELS, "transfg": {"options": {}}}, "'transfg' needs 'seeds'"),
        ({**MODELS, "other": {"seeds": [0]}}, "are not all known; allowed are vit, mevit and transfg"),
        ({**MODELS, "mevit": {"seeds": [0], "epochs": 3}}, "'mevit' needs 'seeds' and may have 'options'"),
    ],
)
def test_bad_settings_get_a_message(directory, models, message):
    with pytest.raises(ValueError, match=message):
        compare.main([str(directory / "compare.yaml"), "--models", json.dumps(models)])


def test_options_that_cannot_be_compared_are_refused_before_training(directory):
    with pytest.raises(ValueError, match="policy='luck' is unknown"):
        compare.main([str(directory / "compare.yaml"), "--policy", "luck"])
    with pytest.raises(ValueError, match="selection_fraction leaves the test photos alone"):
        compare.main([str(directory / "compare.yaml"), "--selection_fraction", "0.1"])
