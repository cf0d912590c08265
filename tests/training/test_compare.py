# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole comparison, on a folder of colours and models of milliseconds."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import compare
import measurements
import train
from modeling_mevit import CalibrationTarget, ImageClassificationDataset
from modeling_mevit.checkpoint import load_image_processor
from modeling_mevit.data.datasets import load_splits
from modeling_mevit.data.image_processing import evaluation_transform
from modeling_mevit.early_exit.calibration import calibrate_predictions
from modeling_mevit.early_exit.predictions import predict_exits
from tests.helpers.images import write_colours
from tests.helpers.runs import SETTINGS, SHAPE


pytestmark = pytest.mark.one_major


MODELS = {
    "vit": {"seeds": [0, 1], "options": {"exit_layers": [3], "uncertainty_weight": 0}},
    "mevit": {"seeds": [0, 1]},
    "transfg": {
        "seeds": [0],
        "options": {
            "architecture": "transfg",
            "model_config": {**SHAPE, "patch_stride": 3},
        },
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("compare")
    write_colours(directory / "colours", deviation=250, shape=(22, 26))
    recipe = {**SETTINGS, "num_train_epochs": 1, "dataset": str(directory / "colours")}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "recipe": str(directory / "recipe.yaml"),
        "models": MODELS,
        "output_dir": str(directory / "runs"),
        "latency_rounds": 2,
        "shown_images": 2,
        "selection_fraction": 0.25,
    }
    (directory / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return directory


def _right(directory: Path, model: str, seed: int) -> np.ndarray:
    """(N, E): which predictions of a run on test are right."""
    file = json.loads((directory / f"runs/{model}-seed{seed}/test_predictions.json").read_text())
    return np.array(file["predictions"]) == np.array(file["labels"])[:, None]


@pytest.fixture(scope="module")
def results(directory) -> dict[str, Any]:
    return compare.main([str(directory / "compare.yaml")])


@pytest.mark.slow
def test_every_model_and_exit_is_in_the_table(results, directory):
    table = (directory / "runs/comparison/table.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert names[:7] == ["model", "---", "plain ViT", "MEViT_1", "MEViT_2", "MEViT_3", "TransFG"]
    assert names[7] == "early exit at a mean cost of at most" and "ViT-B/16 at 448 px" in names
    assert "| TransFG | 5.71 | 1.78 |" in table
    assert "| MEViT_6 | 0.50 | 0.43 |" in table
    assert results["cost"]["mevit_1"]["here"] < results["cost"]["mevit_1"]["published"] < 1
    assert results["latency"]["relative_latency"]["vit"] == 1
    assert len(results["attention_similarity"]) == 3


@pytest.mark.slow
def test_accuracies_are_those_of_the_runs(results, directory):
    for model, rows in results["accuracy"].items():
        for seed in range(len(rows[0]["seeds"])):
            metrics = json.loads((directory / f"runs/{model}-seed{seed}/metrics.json").read_text())
            assert not any("test_accuracy" in row for row in metrics["exits"])  # looked at when all runs are trained
            right = _right(directory, model, seed)
            assert [row["exit"] for row in rows] == [row["exit"] for row in metrics["exits"]]
            assert [row["seeds"][seed] for row in rows] == pytest.approx(right.mean(0).tolist())


@pytest.mark.slow
def test_class_changes_are_the_mean_over_seeds(results, directory):
    changes = []
    for seed in (0, 1):
        file = json.loads((directory / f"runs/mevit-seed{seed}/test_predictions.json").read_text())
        labels, predictions = np.array(file["labels"]), np.array(file["predictions"])
        right = predictions == labels[:, None]
        changes.append([(right[labels == c, 0].mean() - right[labels == c, -1].mean()) for c in range(3)])
    assert results["class_changes"] == pytest.approx(np.mean(changes, axis=0).tolist())


@pytest.mark.slow
def test_early_exit_has_its_thresholds_from_the_images_held_out(results, directory):
    """By the public calibration, on the tenth of train that was moved to validation and on validation."""
    plain = np.mean([_right(directory, "vit", seed)[:, -1] for seed in (0, 1)], axis=0)
    splits = load_splits(directory / "colours", selection_fraction=0.25)
    for seed in (0, 1):
        run = directory / f"runs/mevit-seed{seed}"
        transform = evaluation_transform(load_image_processor(str(run)))
        model = measurements.load(run)
        held_out, test = (
            predict_exits(model, ImageClassificationDataset(splits[split], transform))
            for split in ("validation", "test")
        )
        assert len(held_out) > len(load_splits(directory / "colours")["validation"])
        for row in results["early_exit"]:
            target = CalibrationTarget(max_cost=row["budget"])
            chosen = calibrate_predictions(held_out, target, policy="confidence", num_labels=3).operating_point
            assert chosen is None or chosen.cost <= row["budget"]
            # None: it is best to run every image to the end
            expected = test.simulate("confidence", [-math.inf] * 2 if chosen is None else chosen.thresholds)
            assert (row["costs"][seed], row["seeds"][seed]) == (expected.cost, expected.accuracy)
    for row in results["early_exit"]:
        assert row["difference"] == pytest.approx(np.mean(row["seeds"]) - plain.mean())
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    budgets = measurements.BUDGETS[results["cost"]["mevit_1"]["here"] < measurements.BUDGETS]
    assert [row["budget"] for row in results["early_exit"]] == pytest.approx(budgets.tolist())
    table = (directory / "runs/comparison/table.md").read_text()
    assert table.count("early exit at a mean cost of at most") == 1


@pytest.mark.slow
def test_nothing_is_done_twice(results, directory, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("done again")

    for name in ("early_exit_curve", "latencies", "attention_similarity", "model_costs"):
        monkeypatch.setattr(measurements, name, never)
    monkeypatch.setattr(train, "run", never)
    weights = directory / "runs/mevit-seed1/model.safetensors"
    elsewhere = weights.rename(weights.with_suffix(".elsewhere"))
    assert compare.main([str(directory / "compare.yaml")])["accuracy"] == results["accuracy"]
    elsewhere.rename(weights)


@pytest.mark.slow
def test_what_is_missing_or_depends_on_something_else_is_measured_anew(results, directory, monkeypatch):
    report = directory / "runs/comparison"
    (report / "cost.json").rename(report / "cost.partial")  # interrupted
    (report / "attention.png").unlink()
    measured = []

    def watched(name, original):
        return lambda *args, **options: (measured.append(name), original(*args, **options))[1]

    for name in ("model_costs", "attention_similarity", "latencies", "early_exit_curve"):
        monkeypatch.setattr(measurements, name, watched(name, getattr(measurements, name)))
    again = compare.main([str(directory / "compare.yaml"), "--policy", "margin"])
    assert sorted(measured) == ["attention_similarity", "early_exit_curve", "early_exit_curve", "model_costs"]
    assert again["cost"] == results["cost"] and (report / "attention.png").is_file()


@pytest.mark.slow
def test_a_run_of_another_recipe_is_refused(results, directory):
    with pytest.raises(ValueError, match="vit-seed0 was trained with learning_rate=0.003, and 0.01 is asked for"):
        compare.main([str(directory / "compare.yaml"), "--learning_rate", "0.01"])
    models = {**MODELS, "mevit": {"seeds": [0], "options": {"distillation_weight": 0.5}}}
    with pytest.raises(ValueError, match="mevit-seed0 was trained with distillation_weight=1.0, and 0.5 is asked for"):
        compare.main([str(directory / "compare.yaml"), "--models", json.dumps(models)])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"mevit": {"seeds": [0]}}, "models must have 'vit' and 'mevit', got"),
        ({**MODELS, "transfg": {"options": {}}}, "'transfg' must have 'seeds'"),
        ({**MODELS, "other": {"seeds": [0]}}, "models must be vit, mevit and transfg, got"),
        ({**MODELS, "mevit": {"seeds": [0], "epochs": 3}}, "'mevit' must have 'seeds' and may have 'options', got"),
    ],
)
def test_bad_settings_get_a_message(directory, models, message):
    with pytest.raises(ValueError, match=message):
        compare.main([str(directory / "compare.yaml"), "--models", json.dumps(models)])


def test_options_that_cannot_be_compared_are_refused_before_training(directory):
    with pytest.raises(ValueError, match="policy must be one of .*, got 'luck'"):
        compare.main([str(directory / "compare.yaml"), "--policy", "luck"])
    with pytest.raises(ValueError, match="--learnin_rate 1 is not an option of train.py"):
        compare.main([str(directory / "compare.yaml"), "--learnin_rate", "1"])


def test_settings_of_a_run_come_from_recipe_comparison_command_line_and_model(directory):
    settings = yaml.safe_load((directory / "compare.yaml").read_text())
    models = {"vit": {"seeds": [5], "options": {"exit_layers": [3]}}, "mevit": {"seeds": [0]}}
    changed = {**settings, "models": models, "num_train_epochs": 7, "learning_rate": 0.5}
    config = directory / "changed.yaml"
    config.write_text(yaml.safe_dump(changed))
    comparison = compare.read([str(config), "--learning_rate", "0.25", "--exit_layers", "2", "3"])
    (vit,), (mevit,) = (comparison.runs[name].values() for name in ("vit", "mevit"))
    for run in (vit, mevit):
        assert run.data.image_size == SETTINGS["image_size"]  # of the recipe
        assert run.training.num_train_epochs == 7
        assert run.training.learning_rate == 0.25
    assert (vit.model.exit_layers, mevit.model.exit_layers) == ([3], [2, 3])
    assert (vit.training.seed, mevit.training.seed) == (5, 0)
    assert vit.training.output_dir == str(directory / "runs" / "vit-seed5")


@pytest.mark.parametrize("name", ["compare_grocery_store", "compare_stanford_cars"])
def test_every_comparison_is_understood_from_any_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    comparison = compare.read([f"{name}.yaml", "--dataset", "somewhere"])
    for run in (run for runs in comparison.runs.values() for run in runs.values()):
        assert run.data.dataset == "somewhere" and run.data.image_size == 112
        assert run.training.exit_learning_rate == 3e-3
