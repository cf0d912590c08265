# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from modeling_mevit import MEViTConfig
from modeling_mevit.reports.model_card import NOTICE, render_card, write_card
from tests.helpers.models import tiny_model


METRICS = {
    "dataset": "someone/Grocery",
    "num_samples": {"train": 2640, "validation": 296, "test": 2485},
    "exits": [
        {"exit": 6, "validation_accuracy": 0.5, "test_accuracy": 0.61, "cost": 0.505, "parameters": 10_930_339},
        {"exit": 12, "validation_accuracy": 0.525, "test_accuracy": 0.6251, "cost": 1.0, "parameters": 21_600_000},
    ],
    "training_seconds": 1800.0,
    "recipe": {"backbone": "google/vit-base-patch16-224-in21k", "learning_rate": 0.0001, "model_config": {"a": "b"}},
    "environment": {"accelerator": None, "cpu": "Some CPU", "cores": 2, "torch": "2.15.0", "transformers": "4.57.6"},
    "card": {
        "model_name": "org/mevit-grocery",
        "license": "mit",
        "dataset_on_hub": True,
        "base_model": "google/vit-base-patch16-224-in21k",
        "base_model_on_hub": True,
    },
}
POINT = {
    "policy": "margin",
    "thresholds": [0.25],
    "num_samples": 296,
    "accuracy": 0.52,
    "full_model_accuracy": 0.525,
    "cost": 0.7126,
    "harms": 3,
    "corrections": 2,
    "exit_counts": {"6": 200, "12": 96},
}
CALIBRATION = {
    "target": {"max_accuracy_drop": 0.01},
    "operating_point": POINT,
    "data": {"name": "Grocery", "split": "validation", "half": "first", "sha256": "0123456789abcdef" * 4},
}
EVALUATION = {
    "num_samples": 2485,
    "early_exit": {
        "operating_point": {**POINT, "num_samples": 2485, "accuracy": 0.624},
        "reference": "plain ViT",
        "images_per_second": 20.0,
        "plain_images_per_second": 12.0,
        "relative_latency": 0.6,
        "borderline": 0,
    },
    "calibration_images": 0,
    "data": {"name": "Grocery", "split": "test", "half": None, "sha256": "f" * 64},
    "environment": {"accelerator": "Some GPU", "cpu": "Some CPU", "cores": 2, "threads": 2},
}


def checkpoint(directory: Path, *, metrics=METRICS, calibration=None, evaluation=None, **settings) -> Path:
    """A checkpoint's directory as far as a card reads it."""
    if calibration:
        point = calibration["operating_point"]
        settings |= {"exit_policy": point["policy"], "exit_thresholds": point["thresholds"], "early_exit": True}
    config = MEViTConfig(exit_layers=[6, 12], num_labels=81, calibration=calibration, **settings)
    config.save_pretrained(directory)
    for name, content in {"metrics.json": metrics, "evaluation.json": evaluation}.items():
        if content:
            (directory / name).write_text(json.dumps(content))
    return directory


def headings(card: str) -> list[str]:
    return [line.lstrip("# ") for line in card.splitlines() if line.startswith("#")]


def test_a_trained_checkpoint(tmp_path):
    text = render_card(checkpoint(tmp_path))
    assert headings(text) == ["org/mevit-grocery", "Results", "How to load it", "Training", "Limits", "Licence"]
    assert "after encoder layers\n6, 12, for 81 classes, trained on someone/Grocery." in text
    assert "| 6 | 50.0% | 61.0% | 0.505 | 10.9 M |" in text
    assert "| 12 | 52.5% | 62.5% | 1.000 | 21.6 M |" in text
    assert "2,640 train, 296 validation, 2,485 test images), from google/vit-base-patch16-224-in21k." in text
    assert "It ran for 30 min on Some CPU (2 cores), with PyTorch 2.15.0 and Transformers 4.57.6." in text
    assert '| learning_rate | 0.0001 |\n| model_config | {"a": "b"} |' in text
    assert 'from_pretrained("org/mevit-grocery", dtype="auto", trust_remote_code=True)' in text
    assert "small = model.truncate(6)" in text
    assert (
        "licensed under mit; the terms of someone/Grocery and google/vit-base-patch16-224-in21k apply too. The code"
        in text
    )
    assert text.count("{") == 1 and "\n\n\n" not in text


def test_a_short_run_is_told_in_seconds(tmp_path):
    assert "It ran for 59 s on" in render_card(checkpoint(tmp_path, metrics={**METRICS, "training_seconds": 59.4}))


def test_a_card_tells_how_exits_are_combined(tmp_path):
    sentence = "An exit predicts with the mean of the log-probabilities of the exits passed so far, itself included."
    assert sentence not in render_card(checkpoint(tmp_path))
    made_for = {"exit_combination": "mean"}
    settings = {"calibration": {**CALIBRATION, "made_for": made_for}, "exit_combination": "mean"}
    text = render_card(checkpoint(tmp_path, evaluation={**EVALUATION, "exit_combination": "mean"}, **settings))
    assert f"with the same\nweights. {sentence}\n" in text
    assert "Early exit" in headings(text) and "Early exit, measured" in headings(text)
    # what was measured or calibrated with the exits by themselves is not this model's
    assert "Early exit, measured" not in headings(render_card(checkpoint(tmp_path, evaluation=EVALUATION, **settings)))
    checkpoint(tmp_path, **{**settings, "calibration": CALIBRATION})
    with pytest.warns(UserWarning, match="exit_thresholds were chosen for exit_combination='none', got 'mean'"):
        assert "Early exit" not in headings(render_card(tmp_path))


def test_what_training_measured_is_of_the_combination_then(tmp_path):
    """Also of metrics by older versions, which do not tell one."""
    (tmp_path / "training_curve.png").touch()
    combined = {**METRICS, "exit_combination": "mean"}
    for metrics, combination in ((METRICS, "mean"), (combined, "none")):
        text = render_card(checkpoint(tmp_path, metrics=metrics, exit_combination=combination))
        assert headings(text) == ["org/mevit-grocery", "How to load it", "Training", "Limits", "Licence"]
        assert "62.5%" not in text and "0.6251" not in text and "![" not in text
        assert ModelCard(text).data.eval_results is None and "2,640 train" in text
    text = render_card(checkpoint(tmp_path, metrics=combined, exit_combination="mean"))
    assert "Results" in headings(text) and len(ModelCard(text).data.eval_results) == 2
    assert "![Training loss and validation accuracy](training_curve.png)" in text


def test_figures_are_shown_where_they_exist(tmp_path):
    checkpoint(tmp_path, calibration=CALIBRATION, evaluation=EVALUATION)
    assert "![" not in render_card(tmp_path)
    (tmp_path / "training_curve.png").touch()
    (tmp_path / "accuracy_cost.png").touch()
    text = render_card(tmp_path)
    assert "![Accuracy by mean cost](accuracy_cost.png)\n\n## How to load it" in text
    assert "![Training loss and validation accuracy](training_curve.png)\n\n## Limits" in text


def test_metadata_is_what_the_hub_reads(tmp_path):
    assert write_card(checkpoint(tmp_path))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-classification", "mit")
    assert data.datasets == ["someone/Grocery"]
    assert data.base_model == "google/vit-base-patch16-224-in21k"
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results == {"Accuracy of exit 6": 0.61, "Accuracy of exit 12": 0.6251}
    assert {(result.dataset_type, result.dataset_split) for result in data.eval_results} == {
        ("someone/Grocery", "test")
    }


@pytest.mark.parametrize("name", ["my photos", "colours"])
def test_what_is_not_on_the_hub_is_not_linked(tmp_path, name):
    card = {**METRICS["card"], "dataset_on_hub": False, "base_model": None, "base_model_on_hub": False}
    text = render_card(checkpoint(tmp_path, metrics={**METRICS, "dataset": name, "recipe": {}, "card": card}))
    data = ModelCard(text).data
    assert data.datasets is None and data.base_model is None
    assert data.eval_results[0].dataset_type == name.replace(" ", "-")
    assert f"Trained on {name} (" in text and "from random weights." in text


def test_a_run_of_an_older_version(tmp_path):
    older = {name: value for name, value in METRICS.items() if name not in ("card", "environment")}
    older |= {"machine": METRICS["environment"], "training_seconds": None}
    directory = checkpoint(tmp_path / "mevit-e8", metrics=older)
    text = render_card(directory)
    assert headings(text)[0] == "mevit-e8" and 'from_pretrained("mevit-e8", dtype="auto")' in text
    assert "It ran on Some CPU (2 cores)" in text and "No licence is stated for the weights; the terms of" in text
    data = ModelCard(text).data  # ids with an owner are of the Hub
    assert (data.datasets, data.base_model) == (["someone/Grocery"], "google/vit-base-patch16-224-in21k")


def test_a_checkpoint_without_metrics(tmp_path):
    directory = checkpoint(tmp_path / "mine", metrics=None, calibration=CALIBRATION)
    text = render_card(directory)
    assert headings(text) == ["mine", "Early exit", "How to load it", "Limits", "Licence"]
    assert "after encoder layers\n6, 12, for 81 classes. A model" in text
    assert ModelCard(text).data.eval_results is None
    assert "No licence is stated for the weights. The code" in text


@pytest.mark.parametrize(
    ("target", "promise", "certified"),
    [
        ({"max_cost": 0.7}, "the best accuracy within a mean cost of 0.7 on the calibration images. Nothing", False),
        (
            {"max_accuracy_drop": 0.01, "max_cost": None, "confidence": None, "bound": None},
            "loses at most 1.00% in accuracy against the last exit on the calibration images. Nothing",
            False,
        ),
        (
            {"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": "harm"},
            "Certified: with probability 95% over the draw of the calibration images, early exit loses at most 1.00% "
            "in accuracy against the last exit on images like those (harm bound), if",
            True,
        ),
        ({"max_disagreement": 0.01}, "gives another label than the last exit to at most 1.00% of the cal", False),
        (
            {"max_disagreement": 0.01, "confidence": 0.95, "guarantee": "probability"},
            "Certified: with probability 95% over the draw of the calibration images, early exit gives another label "
            "than the last exit to at most 1.00% of images like those, if",
            True,
        ),
        (
            {"max_accuracy_drop": 0.01, "guarantee": "expectation"},
            "Certified: on average over the draw of the calibration images, early exit loses at most 1.00% in "
            "accuracy against the last exit on images like those, if",
            True,
        ),
    ],
)
def test_a_calibrated_checkpoint_tells_what_is_promised(tmp_path, target, promise, certified):
    made_for = {"dtype": "float32", "weights": "0" * 16}
    calibration = {**CALIBRATION, "target": target, "made_for": made_for}
    text = render_card(checkpoint(tmp_path, calibration=calibration))
    assert ("This holds for these weights in float32." in text) is certified
    assert ("The average counts calibration sets that certify nothing, which lose nothing." in text) is (
        "expectation" in target.values()
    )
    assert headings(text)[:3] == ["org/mevit-grocery", "Results", "Early exit"]
    assert promise in text
    assert ("Nothing is promised for others." in text) is not certified and ("Certified" in text) is certified
    assert "`margin`, 1 − the difference between the two largest probabilities, is below" in text
    assert "| exit | threshold |\n| --- | --- |\n| 6 | 0.25 |\n\n" in text
    assert (
        "296 images of Grocery (validation, first half; SHA-256 of content and labels `0123456789abcdef…`): "
        "accuracy 52.0%, that of the last exit 52.5%, mean cost 0.713" in text
    )
    assert "right on 3 of these images, and right where it is wrong on 2." in text


CERTIFIED = {"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": "harm"}


def test_a_calibration_that_does_not_tell_its_weights_promises_nothing(tmp_path):
    text = render_card(checkpoint(tmp_path, calibration={**CALIBRATION, "target": CERTIFIED}))
    assert "Certified:" not in text and "Nothing is promised until it is run again." in text


def test_other_weights_than_those_that_were_calibrated_are_promised_nothing(tmp_path):
    model = tiny_model(exit_policy="margin", exit_thresholds=[0.25, 0.25], early_exit=True)
    point = {**POINT, "thresholds": [0.25, 0.25], "exit_counts": {"2": 100, "3": 100, "4": 96}}
    model.config.calibration = {
        **CALIBRATION,
        "target": CERTIFIED,
        "operating_point": point,
        "made_for": model.made_for(),
    }
    model.save_pretrained(tmp_path)
    assert "Certified: with probability 95%" in render_card(tmp_path)
    with torch.no_grad():
        model.exits["2"].classifier.bias += 1
    model.save_pretrained(tmp_path)
    assert "ertified" not in render_card(tmp_path) and "Early exit" not in headings(render_card(tmp_path))


@pytest.mark.parametrize("name", ["target", "harms"])
def test_a_calibration_with_a_part_missing_is_named(tmp_path, name):
    point = {key: value for key, value in POINT.items() if key != name}
    calibration = {key: value for key, value in CALIBRATION.items() if key != name} | {"operating_point": point}
    with pytest.raises(ValueError, match=f"calibration of config.json must be as .*; it lacks {name}"):
        render_card(checkpoint(tmp_path, calibration=calibration))


def test_what_was_chosen_without_labels_has_no_accuracy(tmp_path):
    unknown = dict.fromkeys(("accuracy", "full_model_accuracy", "harms", "corrections"))
    calibration = {
        "target": {"max_disagreement": 0.01, "confidence": 0.95, "guarantee": "probability"},
        "operating_point": {**POINT, **unknown, "disagreements": 1},
        "data": {"name": "phone", "split": "unlabelled", "half": None, "sha256": "0123456789abcdef" * 4},
    }
    text = render_card(checkpoint(tmp_path, calibration=calibration))
    assert (
        "The thresholds were chosen on 296 images of phone (unlabelled; SHA-256 of content `0123456789abcdef…`): mean "
        "cost 0.713 of the plain ViT's.\nIt gave another label than the last exit to 1 of these images.\n\n" in text
    )
    assert "None" not in text
    labelled = {**CALIBRATION, "operating_point": {**POINT, "disagreements": 7}}
    text = render_card(checkpoint(tmp_path, calibration=labelled))
    assert "right where it is wrong on 2.\nIt gave another label than the last exit to 7 of these images." in text


def test_images_that_are_not_described(tmp_path):
    text = render_card(checkpoint(tmp_path, calibration={**CALIBRATION, "data": None}))
    assert "The thresholds were chosen on 296 images: accuracy" in text


@pytest.mark.parametrize("changed", [{"early_exit": False}, {"exit_thresholds": [0.3]}])
def test_early_exit_that_is_off_or_has_other_thresholds_is_not_called_calibrated(tmp_path, changed):
    directory = checkpoint(tmp_path, calibration=CALIBRATION, evaluation=EVALUATION)
    assert "Early exit" in headings(render_card(directory))
    config = MEViTConfig.from_pretrained(directory)
    for name, value in changed.items():
        setattr(config, name, value)
    config.save_pretrained(directory)
    assert "Early exit" not in render_card(directory)


def test_an_evaluated_checkpoint(tmp_path):
    text = render_card(checkpoint(tmp_path, calibration=CALIBRATION, evaluation=EVALUATION))
    assert headings(text)[2:5] == ["Early exit", "Early exit, measured", "How to load it"]
    assert (
        "Measured on 2485 images of Grocery (test), none of which is known to have been used to choose the "
        "thresholds; "
        "on Some GPU, 2 threads.\nEarly exit: accuracy 62.4% (last exit 52.5%" in text
    )
    environment = {**EVALUATION["environment"], "device": "cpu"}
    text = render_card(
        checkpoint(tmp_path, calibration=CALIBRATION, evaluation={**EVALUATION, "environment": environment})
    )
    assert "on Some CPU (2 cores), 2 threads." in text


@pytest.mark.parametrize(
    "changed",
    [
        {"calibration_images": 7},
        {"data": {**EVALUATION["data"], "split": "all"}},
        {"data": {**EVALUATION["data"], "split": "train"}},
        {"early_exit": None},
        {"early_exit": {"accuracy": 0.6, "left_at": {"6": 1}}},  # as older versions wrote it
        {"early_exit": {**EVALUATION["early_exit"], "operating_point": {**POINT, "thresholds": [0.3]}}},
        {"early_exit": {**EVALUATION["early_exit"], "operating_point": {**POINT, "policy": "entropy"}}},
    ],
)
def test_an_evaluation_that_says_nothing_of_this_calibration_is_left_out(tmp_path, changed):
    text = render_card(checkpoint(tmp_path, calibration=CALIBRATION, evaluation={**EVALUATION, **changed}))
    assert "Early exit" in headings(text) and "Early exit, measured" not in headings(text)


def test_a_card_of_ours_is_written_again_and_again(tmp_path):
    directory = checkpoint(tmp_path, metrics=None, calibration=CALIBRATION)
    assert write_card(directory)
    once = (directory / "README.md").read_text(encoding="utf-8")
    assert write_card(directory)
    assert (directory / "README.md").read_text(encoding="utf-8") == once
    again = deepcopy(CALIBRATION)
    again["operating_point"]["thresholds"] = [0.75]
    assert write_card(checkpoint(directory, metrics=None, calibration=again))
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert "| 6 | 0.75 |" in card and "| 6 | 0.25 |" not in card and card.count(NOTICE) == 1


def test_a_readme_of_somebodys_own_is_left_alone(tmp_path):
    directory = checkpoint(tmp_path, metrics=None)
    (directory / "README.md").write_text("# Mine\n")
    assert not write_card(directory)
    assert (directory / "README.md").read_text() == "# Mine\n"
    assert write_card(checkpoint(directory, metrics=METRICS))  # of a run, which begins with a draft of Transformers
    assert NOTICE in (directory / "README.md").read_text(encoding="utf-8")
