# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `mevit` on a tiny model whose early exits are as good as its last one."""

import json
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

import modeling_mevit
from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.checkpoint import load_model
from modeling_mevit.early_exit.cost import static_exit_costs


def config_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def test_calibrates_for_a_cost_and_a_pipeline_then_leaves_early(mevit, checkpoint, photos):
    weights = (checkpoint / "model.safetensors").read_bytes()
    code, out = mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6")
    assert code == 0 and f"Early exit is on in {checkpoint}" in out
    config = config_of(checkpoint)
    assert config["early_exit"] and len(config["exit_thresholds"]) == 2
    calibration = config["calibration"]
    assert calibration["target"] == {"max_cost": 0.6} and calibration["operating_point"]["cost"] <= 0.6
    assert calibration["data"]["name"] == photos.name and calibration["data"]["split"] == "validation"
    assert calibration["operating_point"]["num_samples"] == 80
    assert (checkpoint / "model.safetensors").read_bytes() == weights

    classify = pipeline("image-classification", model=str(checkpoint))
    reached = []
    classify.model.exits["4"].register_forward_hook(lambda *args: reached.append(4))
    answers = [classify(str(file))[0]["label"] == file.parent.name for file in photos.glob("test/*/*.png")]
    assert np.mean(answers) > 0.9 and len(reached) < 20


def test_exits_can_be_left_out(mevit, checkpoint, photos):
    code, _ = mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.9", "--exits", "3")
    config = config_of(checkpoint)
    assert code == 0 and config["calibration"]["target"] == {"max_cost": 0.9, "exits": [3]}
    assert config["exit_thresholds"][0] == 0 < config["exit_thresholds"][1]
    assert config["calibration"]["operating_point"]["exit_counts"]["2"] == 0


@pytest.mark.parametrize("bound", ["harm", "difference"])
def test_certifies_where_early_exits_do_no_harm(mevit, checkpoint, photos, bound):
    target = ["--max-accuracy-drop", "0.1", "--confidence", "0.9", "--bound", bound]
    code, out = mevit("calibrate", checkpoint, "--data", photos, *target, "--policy", "confidence")
    assert code == 0 and "with probability 90%, the true accuracy drop is at most 10.00%" in out
    config = config_of(checkpoint)
    assert config["exit_policy"] == "confidence"
    calibration = config["calibration"]
    target = {"max_accuracy_drop": 0.1, "confidence": 0.9, "bound": bound, "guarantee": "probability"}
    assert calibration["target"] == target
    assert calibration["operating_point"]["num_samples"] == 80
    card = (checkpoint / "README.md").read_text()
    assert "probability 90%" in card and card.index("## Early exit") < card.index("## How to load")
    mevit("calibrate", checkpoint, "--data", photos, "--max-accuracy-drop", "0.05")
    card = (checkpoint / "README.md").read_text()
    assert card.count("## Early exit") == 1 and "probability 90%" not in card


def test_calibrates_in_bfloat16_and_then_runs_in_it(mevit, checkpoint, photos, tmp_path):
    weights = (checkpoint / "model.safetensors").read_bytes()
    target = ["--max-accuracy-drop", "0.1", "--confidence", "0.9", "--policy", "confidence"]
    code, out = mevit("calibrate", checkpoint, "--data", photos, *target, "--dtype", "bfloat16")
    assert code == 0 and "Certified on 80 images" in out
    calibration = config_of(checkpoint)["calibration"]
    assert calibration["made_for"]["dtype"] == config_of(checkpoint)["dtype"] == "bfloat16"
    assert (checkpoint / "model.safetensors").read_bytes() == weights  # all that float32 holds
    assert "This holds for these weights in bfloat16." in (checkpoint / "README.md").read_text()
    file = photos / "test" / "teal" / "0.png"
    with warnings.catch_warnings(action="error", category=UserWarning):
        model = load_model(str(checkpoint), "cpu")
        assert model.dtype == torch.bfloat16 and model.certificate == calibration["target"]
        code, out = mevit("evaluate", checkpoint, "--data", photos)
        assert code == 0 and " images, in bfloat16" in out
        assert mevit("predict", checkpoint, file)[0] == 0
    evaluated = json.loads((checkpoint / "evaluation.json").read_text())
    assert evaluated["precision"] == "bfloat16"
    assert evaluated["early_exit"]["operating_point"]["thresholds"] == calibration["operating_point"]["thresholds"]
    assert "## Early exit, measured" in (checkpoint / "README.md").read_text()

    told = "certificate of early exit is gone: the precision is float32, not bfloat16"
    with pytest.warns(UserWarning, match=told):
        assert mevit("predict", checkpoint, file, "--dtype", "float32")[0] == 0
    with pytest.warns(UserWarning, match=told):
        mevit("evaluate", checkpoint, "--data", photos, "--dtype", "float32", "--output", tmp_path / "in_float32")
    assert json.loads((tmp_path / "in_float32" / "evaluation.json").read_text())["precision"] == "float32"
    mevit("calibrate", checkpoint, "--data", photos, *target, "--dtype", "bfloat16", "--output", tmp_path / "half")
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * len(weights)
    assert load_model(str(tmp_path / "half"), "cpu").certificate == calibration["target"]


@pytest.fixture
def unlabelled(photos, tmp_path) -> Path:
    """The validation images, in one folder."""
    folder = tmp_path / "phone"
    folder.mkdir()
    for file in photos.glob("validation/*/*.png"):
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    return folder


@pytest.mark.parametrize("guarantee", [("--confidence", "0.9"), ("--guarantee", "expectation")])
def test_calibrates_without_labels(mevit, checkpoint, photos, unlabelled, guarantee):
    target = ["--max-disagreement", "0.1", *guarantee, "--policy", "confidence"]
    code, out = mevit("calibrate", checkpoint, "--data", unlabelled, *target)
    assert code == 0 and "Certified" in out and "On 80 images: disagreement" in out and "accuracy 9" not in out
    calibration = config_of(checkpoint)["calibration"]
    assert calibration["data"]["name"] == "phone" and calibration["data"]["split"] == "unlabelled"
    assert calibration["operating_point"]["num_samples"] == 80 and calibration["operating_point"]["harms"] is None
    assert MEViTForImageClassification.from_pretrained(checkpoint).certificate == calibration["target"]
    assert "80 images of phone (unlabelled;" in (checkpoint / "README.md").read_text()
    # labels are not looked at where there are any
    mevit("calibrate", checkpoint, "--data", photos, *target)
    labelled = config_of(checkpoint)["calibration"]["operating_point"]
    known = {name: value for name, value in labelled.items() if calibration["operating_point"][name] is not None}
    assert known == {name: value for name, value in calibration["operating_point"].items() if value is not None}

    code, out = mevit("evaluate", checkpoint, "--data", photos)
    assert code == 0 and "corrected), disagreement " in out
    assert "disagreement " in (checkpoint / "README.md").read_text()


def test_images_that_calibrated_without_labels_do_not_evaluate(mevit, checkpoint, photos, unlabelled):
    mevit("calibrate", checkpoint, "--data", unlabelled, "--max-disagreement", "0.1")
    code, _ = mevit("evaluate", checkpoint, "--data", photos, "--split", "validation")
    assert code.startswith("mevit: error: 80 of these 80 images chose the thresholds")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calibrate", "--max-accuracy-drop", "0.1"), "max_accuracy_drop needs labels, and these 80 images have none"),
        (("calibrate", "--max-cost", "0.6"), "max_cost or max_accuracy_drop needs labels"),
        (("evaluate",), "evaluation needs labels, and these 80 images have none"),
        (("evaluate", "--split", "test"), "split must be 'unlabelled' for "),
        (
            ("calibrate", "--max-disagreement", "0.01", "--confidence", "0.95"),
            "at least 299 images are needed to certify a disagreement of at most 1.00% with probability 95%",
        ),
    ],
)
def test_says_what_images_without_labels_cannot_do(mevit, checkpoint, unlabelled, arguments, message):
    command, *options = arguments
    code, _ = mevit(command, checkpoint, "--data", unlabelled, *options)
    assert code.startswith("mevit: error: ") and message in code


def test_leaves_early_exit_off_where_nothing_can_be_certified(mevit, checkpoint, photos):
    mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.9")
    weights = load_file(checkpoint / "model.safetensors")
    for layer in ("2", "3"):
        weights[f"exits.{layer}.classifier.weight"] *= -1  # sure and wrong
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    target = ["--max-accuracy-drop", "0.1", "--confidence", "0.9", "--policy", "confidence"]
    code, out = mevit("calibrate", checkpoint, "--data", photos, *target)
    assert code == 1
    assert "No thresholds that save cost can be certified for a drop of at most 10.00%" in out
    assert "no number of images would certify them" in out and "Early exit is off" in out
    config = config_of(checkpoint)
    assert config["early_exit"] is False and config["calibration"] is None and config["exit_thresholds"] is None
    assert "## Early exit" not in (checkpoint / "README.md").read_text()


@pytest.mark.parametrize("bound", ["harm", "difference"])
def test_says_how_many_images_could_certify(mevit, checkpoint, photos, bound):
    before = (checkpoint / "config.json").read_bytes()
    target = ["--max-accuracy-drop", "0.01", "--confidence", "0.95", "--policy", "confidence", "--bound", bound]
    error, _ = mevit("calibrate", checkpoint, "--data", photos, *target)
    assert "at least 299 images are needed to certify a drop of at most 1.00% with probability 95%" in str(error)
    assert "got 80" in str(error) and (checkpoint / "config.json").read_bytes() == before


@pytest.mark.parametrize("budget", [("--max-cost", "1"), ("--max-accuracy-drop", "0")])
def test_says_where_running_to_the_end_is_best(mevit, checkpoint, photos, budget):
    mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.9")
    weights = load_file(checkpoint / "model.safetensors")
    for layer in ("2", "3"):
        weights[f"exits.{layer}.classifier.weight"] *= -1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    code, out = mevit("calibrate", checkpoint, "--data", photos, *budget, "--policy", "confidence")
    assert code == 1 and "No thresholds that let an image leave early are better than running" in out
    assert config_of(checkpoint)["early_exit"] is False


def test_patience(mevit, checkpoint, photos):
    code, _ = mevit("calibrate", checkpoint, "--data", photos, "--max-accuracy-drop", "0.05", "--policy", "patience")
    config = config_of(checkpoint)
    assert code == 0 and config["exit_policy"] == "patience"
    assert config["exit_thresholds"][0] == config["exit_thresholds"][1] > 1 / 3  # one exit, or two that agree
    code, out = mevit("evaluate", checkpoint, "--data", photos)
    assert code == 0 and "Early exit: accuracy" in out


def test_combines_the_exits_of_a_trained_checkpoint(mevit, checkpoint, photos):
    config = {**config_of(checkpoint), "exit_combination": "mean"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    code, _ = mevit("calibrate", checkpoint, "--data", photos, "--max-accuracy-drop", "0.05")
    assert code == 0 and config_of(checkpoint)["calibration"]["made_for"]["exit_combination"] == "mean"
    code, out = mevit("evaluate", checkpoint, "--data", photos)
    sentence = "An exit predicts with the mean of the log-probabilities of the exits passed so far"
    assert code == 0 and sentence in out and sentence in (checkpoint / "README.md").read_text()
    assert json.loads((checkpoint / "evaluation.json").read_text())["exit_combination"] == "mean"
    costs = [row["cost"] for row in json.loads((checkpoint / "evaluation.json").read_text())["exits"]]
    assert costs == list(static_exit_costs(MEViTConfig.from_pretrained(checkpoint)).values())


def test_evaluates_and_writes_json_table_and_image(mevit, checkpoint, photos, tmp_path):
    mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6", "--half", "first")
    output = tmp_path / "results"
    plain = tmp_path / "plain"
    MEViTForImageClassification.from_pretrained(checkpoint).to_vit().save_pretrained(plain)
    shutil.copy(checkpoint / "preprocessor_config.json", plain)
    code, out = mevit("evaluate", checkpoint, "--data", photos, "--plain", plain, "--output", output)
    assert code == 0
    results = json.loads((output / "evaluation.json").read_text())
    assert results["num_samples"] == 40 and results["data"]["split"] == "test"
    assert [row["exit"] for row in results["exits"]] == [2, 3, 4]
    assert results["plain_accuracy"] == pytest.approx(results["exits"][-1]["accuracy"])
    assert 0.5 < results["policies"]["patience"]["area"] <= results["policies"]["patience"]["oracle"]
    point = results["early_exit"]["operating_point"]
    assert point["cost"] < 0.8 and sum(point["exit_counts"].values()) == 40
    assert (output / "evaluation.md").read_text().strip() in out
    assert "| policy | area | oracle | AUROC 2 | AUROC 3 | AUROC 4 |" in out
    assert Image.open(output / "accuracy_cost.png").size[0] > 500
    assert str(photos) not in (output / "evaluation.json").read_text()


def test_the_images_that_calibrated_do_not_evaluate(mevit, checkpoint, photos, tmp_path):
    mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6")
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    code, _ = mevit("evaluate", checkpoint, "--data", moved, "--split", "validation")
    assert code.startswith("mevit: error: 80 of these 80 images chose the thresholds")
    assert mevit("evaluate", checkpoint, "--data", moved, "--split", "validation", "--force")[0] == 0


def test_nor_do_sets_that_hold_some_of_them(mevit, checkpoint, photos, tmp_path):
    mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6", "--split", "test", "--half", "first")
    code, _ = mevit("evaluate", checkpoint, "--data", photos)
    assert code.startswith("mevit: error: 20 of these 40 images chose the thresholds")
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    assert "20 of these 40 images chose the thresholds" in mevit("evaluate", checkpoint, "--data", moved)[0]
    assert mevit("evaluate", checkpoint, "--data", photos, "--half", "second")[0] == 0


def test_predicts_label_probability_and_exit(mevit, checkpoint, photos):
    files = [photos / "test" / name / "0.png" for name in ("crimson", "teal")]
    code, out = mevit("predict", checkpoint, *files)
    rows = [line.split("\t") for line in out.strip().splitlines()]
    assert code == 0 and [row[:2] for row in rows] == [[str(file), file.parent.name] for file in files]
    assert all(0.5 < float(row[2]) <= 1 and row[3] == "exit 4" for row in rows)
    mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.45")
    assert "exit 2" in mevit("predict", checkpoint, *files)[1]


def test_predicts_the_others_where_files_cannot_be_read(mevit, checkpoint, photos, tmp_path):
    good = [photos / "test" / name / "0.png" for name in ("crimson", "teal")]
    (tmp_path / "text.png").write_text("text")
    Image.new("F", (16, 16)).save(tmp_path / "float.tif")
    bad = [tmp_path / "text.png", tmp_path / "absent.png", tmp_path / "float.tif"]
    files = [bad[0], good[0], bad[1], bad[2], good[1]]
    expected = mevit("predict", checkpoint, *good)[1].splitlines()
    for batch_size in (1, 2, 3, 32):
        code, out = mevit("predict", checkpoint, *files, "--batch-size", batch_size)
        lines = out.splitlines()
        assert code == 1 and [lines[1], lines[4]] == expected
        for line, file in zip([lines[0], *lines[2:4]], bad, strict=True):
            assert line.startswith(f"{file}\terror: cannot read the image {file}: ")
    code, out = mevit("predict", checkpoint, *bad)
    assert code == 1 and len(out.splitlines()) == 3


def test_a_result_that_is_not_a_number_is_no_answer(mevit, checkpoint, photos):
    files = [photos / "test" / name / "0.png" for name in ("crimson", "teal")]
    weights = load_file(checkpoint / "model.safetensors")
    weights["exits.4.classifier.weight"] *= np.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    code, out = mevit("predict", checkpoint, *files)
    assert code == 1
    assert out.splitlines() == [f"{file}\terror: the model's result is not a number" for file in files]


def test_a_decompression_bomb_is_told_in_one_line(mevit, checkpoint, photos, tmp_path, monkeypatch):
    bomb, good = tmp_path / "bomb.png", photos / "test" / "teal" / "0.png"
    Image.new("L", (100, 100)).save(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    code, out = mevit("predict", checkpoint, bomb, good)
    assert (
        code == 1 and "decompression bomb" in out.splitlines()[0] and out.splitlines()[1].startswith(f"{good}\tteal")
    )
    with_bomb = shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(bomb, with_bomb / "test" / "teal" / "bomb.png")
    code, _ = mevit("evaluate", checkpoint, "--data", with_bomb)
    assert f"{with_bomb / 'test' / 'teal' / 'bomb.png'}: " in code and "decompression bomb" in code
    assert "\n" not in code


def test_writes_a_whole_checkpoint_elsewhere(mevit, checkpoint, photos, tmp_path):
    before = config_of(checkpoint)
    code, _ = mevit(
        "calibrate", checkpoint, "--data", photos, "--max-cost", "0.6", "--output", tmp_path / "calibrated"
    )
    assert code == 0 and config_of(checkpoint) == before
    loaded = MEViTForImageClassification.from_pretrained(tmp_path / "calibrated")
    assert loaded.config.early_exit and (tmp_path / "calibrated" / "preprocessor_config.json").is_file()
    assert "## Early exit" in (tmp_path / "calibrated" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--max-cost", "0.6", "--max-accuracy-drop", "0.1"],
            "needs one of max_cost, max_accuracy_drop and max_disagreement",
        ),
        ([], "needs one of max_cost, max_accuracy_drop and max_disagreement"),
        (["--max-cost", "0.6", "--confidence", "0.9"], "confidence=0.9 needs max_accuracy_drop"),
        (["--max-cost", "0.1"], "max_cost must be at least 0.3.*, the cost of the first exit to leave at, got 0.1"),
        (["--max-accuracy-drop", "2"], "max_accuracy_drop must be at least 0 and below 1, got 2.0"),
        (["--max-accuracy-drop", "0.1", "--confidence", "1"], "confidence must be between 0 and 1, got 1.0"),
        (["--max-accuracy-drop", "0.1", "--bound", "harm"], "bound='harm' needs confidence"),
        (["--max-accuracy-drop", "0.1", "--confidence", "0.9", "--split", "all"], "it can certify nothing"),
        (["--max-cost", "0.6", "--device", "abacus"], "device='abacus' cannot be used here"),
        (["--max-cost", "0.6", "--split", "dev"], "dev"),
        (["--max-cost", "0.6", "--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_ends_with_one_line_and_changes_nothing(mevit, checkpoint, photos, arguments, message):
    before = config_of(checkpoint)
    code, _ = mevit("calibrate", checkpoint, "--data", photos, *arguments)
    assert re.search(message, code) and "\n" not in code
    assert config_of(checkpoint) == before


def test_checkpoints_that_cannot_leave_early_are_named(mevit, checkpoint, photos, tmp_path):
    MEViTForImageClassification.from_pretrained(checkpoint).truncate(2).save_pretrained(tmp_path / "one")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "one")
    assert (
        "needs at least two exits; the model has one"
        in mevit("calibrate", tmp_path / "one", "--data", photos, "--max-cost", "0.6")[0]
    )
    assert (
        "must name a plain ViT, which has one exit"
        in mevit("evaluate", checkpoint, "--data", photos, "--plain", checkpoint)[0]
    )

    weights_before = (checkpoint / "model.safetensors").read_bytes()
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if not name.startswith("uncertainty")},
        checkpoint / "model.safetensors",
        metadata={"format": "pt"},
    )
    code, _ = mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6")
    assert "lacks 2 weights of the model, first uncertainty.bias." in code
    (checkpoint / "model.safetensors").write_bytes(weights_before[:1000])
    code, _ = mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6")
    assert code.startswith("mevit: error: ") and "\n" not in code
    unseen = shutil.copytree(photos, tmp_path / "unseen")
    (unseen / "train" / "ochre").mkdir()
    (unseen / "validation" / "ochre").mkdir()
    for split in ("train", "validation"):
        shutil.copy(photos / "test" / "teal" / "0.png", unseen / split / "ochre")
    (checkpoint / "model.safetensors").write_bytes(weights_before)
    code, _ = mevit("calibrate", checkpoint, "--data", unseen, "--max-cost", "0.6")
    assert "1 classes of" in code and "'ochre'" in code


def test_a_model_with_one_exit_is_evaluated_without_curves(mevit, checkpoint, photos, tmp_path):
    MEViTForImageClassification.from_pretrained(checkpoint).truncate(2).save_pretrained(tmp_path / "one")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "one")
    code, _ = mevit("evaluate", tmp_path / "one", "--data", photos)
    results = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert code == 0 and results["policies"]["margin"]["area"] == results["exits"][0]["accuracy"]


def test_an_older_checkpoint_gets_the_code_that_knows_early_exit(mevit, checkpoint, photos):
    (checkpoint / "modeling_mevit.py").write_text("raise ImportError('an older model')\n")
    (checkpoint / "encoder_layer_mevit.py").unlink()
    assert mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6")[0] == 0
    assert "early_exit" in (checkpoint / "modeling_mevit.py").read_text()
    assert (checkpoint / "encoder_layer_mevit.py").is_file()
    assert "## Early exit" in (checkpoint / "README.md").read_text()


def test_images_are_hashed_once_and_opened_once_for_each_model(mevit, checkpoint, photos, tmp_path, monkeypatch):
    mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.6")
    plain = tmp_path / "plain"
    MEViTForImageClassification.from_pretrained(checkpoint).to_vit().save_pretrained(plain)
    shutil.copy(checkpoint / "preprocessor_config.json", plain)
    read, opened = [], []
    read_bytes, open_image = Path.read_bytes, Image.open
    monkeypatch.setattr(Path, "read_bytes", lambda file: (read.append(file), read_bytes(file))[1])
    monkeypatch.setattr(Image, "open", lambda file, *args: (opened.append(file), open_image(file, *args))[1])
    assert mevit("evaluate", checkpoint, "--data", photos)[0] == 0
    assert (len([file for file in read if file.suffix == ".png"]), len(opened)) == (40, 40)
    opened.clear()
    assert mevit("evaluate", checkpoint, "--data", photos, "--plain", plain)[0] == 0
    assert len(opened) == 80


def test_help_is_quick_and_the_version_is_told():
    """In processes of their own, whose processor time is counted."""
    for command in (["--help"], ["calibrate", "--help"]):
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "modeling_mevit", *command], capture_output=True, text=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and "Usage: " in done.stdout, done.stderr
        assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < 1
    done = subprocess.run([sys.executable, "-m", "modeling_mevit", "--version"], capture_output=True, text=True)
    assert done.stdout == f"mevit {modeling_mevit.__version__}\n"
