# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The training script on a small folder of images: everything that a run promises to write and to survive."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import timeit
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTModel, pipeline

import run_results
import settings
import train
from modeling_mevit import cli
from modeling_mevit.data.identity import count_known, encode_digests
from modeling_mevit.data.image_processing import image_processor_for, train_transform
from modeling_mevit.training_args import MEViTTrainingArguments
from tests.helpers.hub import RecordedHub, record_hub
from tests.helpers.images import COLOURS
from tests.helpers.models import tiny_model
from tests.helpers.runs import SHAPE, config_file


ROOT = Path(__file__).parents[2]


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory but its checkpoints."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
def test_writes_everything(finished):
    output, metrics = finished
    files = {path.name for path in output.iterdir() if path.is_file()}
    assert files >= {
        "config.json",
        "configuration_mevit.py",
        "model.safetensors",
        "modeling_mevit.py",
        "preprocessor_config.json",
        "metrics.json",
        "test_predictions.json",
        "validation_predictions.json",
        "training_curve.png",
        "README.md",
    }
    assert json.loads((output / "metrics.json").read_text()) == metrics
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "crimson", "1": "indigo", "2": "teal"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert Image.open(output / "training_curve.png").size[0] > 500


@pytest.mark.slow
def test_metrics_are_of_every_exit(finished):
    _, metrics = finished
    assert metrics["num_samples"] == {"train": 36, "validation": 12, "test": 18}
    assert [row["exit"] for row in metrics["exits"]] == [1, 2, 3]
    costs = [row["cost"] for row in metrics["exits"]]
    assert costs == sorted(costs) and 0.7 < costs[-1] < 1  # the last layer is computed for [CLS] alone
    parameters = [row["parameters"] for row in metrics["exits"]]
    assert parameters[1] - parameters[0] == parameters[2] - parameters[1] > 0
    assert metrics["recipe"]["learning_rate"] == 0.003
    assert metrics["recipe"]["model_config"] == SHAPE
    assert metrics["dataset"] == "colours"
    assert metrics["exit_combination"] == "none"
    assert metrics["card"] == {
        "model_name": "colours-mevit",
        "license": None,
        "dataset_on_hub": False,
        "base_model": None,
        "base_model_on_hub": False,
    }
    assert metrics["environment"]["torch"] == version("torch")
    assert metrics["training_seconds"] > 0


@pytest.mark.slow
def test_a_run_that_chooses_a_recipe_leaves_test_alone(folder, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--dataset", str(folder), "--output_dir", str(output), "--max_steps", "1"]
    metrics = train.main([config_file(tmp_path), *options, "--selection_fraction", "0.25"])
    assert metrics["num_samples"] == {"train": 27, "validation": 12 + 9}
    assert "validation_accuracy" in metrics["exits"][0] and "test_accuracy" not in metrics["exits"][0]
    assert len(json.loads((output / "validation_predictions.json").read_text())["labels"]) == 21
    assert not (output / "test_predictions.json").exists()
    assert "| exit | validation accuracy | cost | parameters |" in capsys.readouterr().out
    results = ModelCard.load(output / "README.md").data.eval_results
    assert {result.dataset_split for result in results} == {"validation"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [".", "checkpoint-4", "checkpoint-18"])
def test_every_checkpoint_knows_the_images_that_trained_it(finished, folder, checkpoint):
    config = json.loads((finished[0] / checkpoint / "config.json").read_text())
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "train").rglob("*.png")]
    assert len(hashes) == 36
    assert config["training_images"] == encode_digests(hashes)


@pytest.mark.slow
def test_prints_the_table(run_again, capsys):
    _, again = run_again
    row = again()["exits"][0]
    table = capsys.readouterr().out
    assert "| exit | validation accuracy | test accuracy | cost | parameters |" in table
    assert f"| 1 | {row['validation_accuracy']:.1%} | {row['test_accuracy']:.1%} | {row['cost']:.3f} |" in table


@pytest.mark.slow
def test_the_saved_processor_and_model_reproduce_the_accuracy_of_every_exit(finished, folder):
    output, metrics = finished
    on_pillow = AutoImageProcessor.from_pretrained(output, backend="pil")
    classify = pipeline("image-classification", str(output), image_processor=on_pillow)
    files = sorted((folder / "test").rglob("*.png"))
    answers = [answer[0]["label"] for answer in classify([str(file) for file in files])]
    right = [label == file.parent.name for label, file in zip(answers, files, strict=True)]
    assert np.mean(right) == metrics["exits"][-1]["test_accuracy"] > 0.5

    pixel_values = classify.image_processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predictions = classify.model(pixel_values).exit_logits.argmax(-1)
    labels = torch.tensor([sorted(COLOURS).index(file.parent.name) for file in files])
    for place, row in enumerate(metrics["exits"]):
        assert (predictions[:, place] == labels).float().mean() == pytest.approx(row["test_accuracy"])
    saved = json.loads((output / "test_predictions.json").read_text())
    assert saved["predictions"] == predictions.tolist()
    assert saved["labels"] == labels.tolist()


@pytest.mark.slow
def test_one_exit_is_the_plain_vit(folder, tmp_path):
    config = config_file(tmp_path, max_steps=2)
    options = ["--dataset", str(folder), "--output_dir", str(tmp_path / "run")]
    metrics = train.main([config, *options, "--exit_layers", "3", "--uncertainty_weight", "0"])
    assert [row["exit"] for row in metrics["exits"]] == [3]
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert all(entry["loss"] == pytest.approx(entry["loss_cross_entropy/exit_3"], abs=1e-3) for entry in steps)
    assert not any("distillation" in name for name in steps[0])


MEAN_AND_STD = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.fixture
def backbone(tmp_path) -> tuple[Path, ViTModel]:
    """A pretrained ViT, with its image processor, and where it lies."""
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SHAPE, image_size=32))
    model.save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "preprocessor_config.json").write_text(json.dumps(MEAN_AND_STD))
    return tmp_path / "backbone", model


@pytest.mark.slow
def test_starts_from_a_backbone(folder, tmp_path, backbone):
    config = config_file(tmp_path, max_steps=1, model_config=None, learning_rate=0.0)
    options = ["--dataset", str(folder), "--output_dir", str(tmp_path / "run")]
    metrics = train.main([config, *options, "--backbone", str(backbone[0])])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    name = "embeddings.cls_token"
    assert model.vit.state_dict()[name].equal(backbone[1].state_dict()[name])
    processor = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert {key: processor[key] for key in MEAN_AND_STD} == MEAN_AND_STD
    assert metrics["recipe"]["backbone"] == metrics["card"]["base_model"] == "backbone"


@pytest.mark.slow
def test_the_recipe_for_ones_own_images_needs_their_folder_alone(folder, tmp_path, backbone):
    output = tmp_path / "run"
    small = ["--backbone", str(backbone[0]), "--image_size", "32", "--dataloader_num_workers", "0", "--use_cpu"]
    options = ["--dataset", str(folder), "--output_dir", str(output), "--num_train_epochs", "10", *small]
    metrics = train.main(["finetune.yaml", *options, "--per_device_train_batch_size", "12"])
    assert metrics["exits"][-1]["test_accuracy"] > 0.8
    assert metrics["recipe"]["warmup_steps"] == 0.1
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert len(rates) == 30 and rates.index(max(rates)) == 3  # the first tenth warms up


def test_a_backbone_needs_an_image_processor_with_mean_and_deviation(folder, tmp_path):
    backbone = tmp_path / "backbone"
    ViTModel(ViTConfig(**SHAPE, image_size=32)).save_pretrained(backbone)
    config = config_file(tmp_path, max_steps=1, model_config=None)
    command = [config, "--dataset", str(folder), "--output_dir", str(tmp_path / "run"), "--backbone", str(backbone)]
    with pytest.raises(OSError, match="preprocessor_config.json"):
        train.main(command)
    (backbone / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="image processor of .*backbone must have image_mean and image_std"):
        train.main(command)


@pytest.mark.slow
def test_an_interrupted_run_loses_nothing_since_its_last_checkpoint(finished, folder, tmp_path):
    whole, _ = finished
    output = tmp_path / "run"
    command = [sys.executable, "training/train.py", config_file(tmp_path)]
    command += ["--dataset", str(folder), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while not (output / "checkpoint-8" / "trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (output / "checkpoint-12").mkdir(exist_ok=True)  # the one that was being written
    assert not (output / "metrics.json").exists()

    train.main(command[2:])
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (output, whole)]
    losses = [{entry["step"]: entry["loss"] for entry in log if "loss" in entry} for log in logs]
    assert list(losses[0]) == list(range(1, 19))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4)


@pytest.fixture
def hub(monkeypatch) -> RecordedHub:
    return record_hub(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--hub_model_id", "someone/colours"], []], ids=["named", "unnamed"])
def test_pushes_to_the_hub_as_the_examples_of_transformers_do(folder, tmp_path, hub, options):
    output = tmp_path / "colours"
    config = config_file(tmp_path, max_steps=4)
    train.main([config, "--dataset", str(folder), "--output_dir", str(output), "--push_to_hub", "true", *options])

    assert hub.repositories == ["someone/colours" if options else "colours"]
    first, last = hub.uploads[0], hub.uploads[-1]
    assert first["commit_message"] == "Training in progress, step 4"
    assert last["repo_id"] == "someone/colours"
    published = {"model.safetensors", "modeling_mevit.py", "config.json", "preprocessor_config.json"}
    assert set(first["files"]) >= published
    assert set(last["files"]) >= published | {"README.md", "metrics.json", "training_curve.png"}
    for upload in hub.uploads:
        sent = b"".join(name.encode() + content for name, content in upload["files"].items())
        assert os.fsencode(tmp_path) not in sent
        assert not [name for name in upload["files"] if name.endswith((".bin", ".pt", ".pth", "state.json"))]
    card = (output / "README.md").read_text()
    assert 'from_pretrained("someone/colours", dtype="auto", trust_remote_code=True)' in card


@pytest.mark.slow
def test_a_finished_run_is_pushed_as_it_is_calibrated(run_again, hub):
    output, again = run_again
    model = AutoModelForImageClassification.from_pretrained(output)
    model.config.exit_thresholds, model.config.early_exit = [0.1, 0.2], True
    model.config.save_pretrained(output)
    before = contents(output)
    again("--push_to_hub", "true")
    assert set(hub.uploads[-1]["files"]) >= {"model.safetensors", "config.json", "README.md"}
    after = contents(output)
    assert {name for name in before if before[name] != after[name]} <= {
        "README.md",
        "metrics.json",
        "training_args.bin",
    }
    assert 'from_pretrained("someone/colours", dtype="auto", trust_remote_code=True)' in after["README.md"].decode()


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(finished, run_again, monkeypatch):
    output, again = run_again
    before = contents(output)
    monkeypatch.setattr(run_results, "predict_splits", lambda *args: pytest.fail("evaluated again"))
    assert again() == finished[1]
    assert contents(output) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing", ["metrics.json", "test_predictions.json", "model.safetensors", "training_curve.png", "README.md"]
)
def test_a_finished_run_gets_what_it_lacks(finished, run_again, missing):
    output, again = run_again
    before = contents(output)
    (output / missing).unlink()
    metrics = again()
    assert metrics["exits"] == finished[1]["exits"]
    assert metrics["training_seconds"] == (None if missing == "metrics.json" else finished[1]["training_seconds"])
    after = contents(output)
    assert after.keys() == before.keys()
    rewritten = {name for name in before if before[name] != after[name]}
    rendered = {"README.md"} if missing == "metrics.json" else set()  # it told how long the training took
    assert rewritten <= {missing, "training_args.bin", *rendered} - {"model.safetensors"}


@pytest.mark.slow
def test_results_of_a_shorter_training_are_replaced(finished, run_again):
    output, again = run_again
    weights = (output / "model.safetensors").read_bytes()
    state = json.loads((output / "trainer_state.json").read_text())
    # as if training had gone on and stopped right after its last checkpoint
    (output / "trainer_state.json").write_text(json.dumps({**state, "global_step": 6, "epoch": 1.0}))
    (output / "model.safetensors").write_bytes(b"of epoch 1")
    (output / "metrics.json").write_text('{"exits": []}')
    metrics = again()
    assert metrics["exits"] == finished[1]["exits"]
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert (output / "model.safetensors").read_bytes() == weights
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == state["global_step"]


@pytest.mark.slow
def test_a_calibration_outlives_the_same_command(run_again, folder, monkeypatch):
    output, again = run_again
    for options in (["calibrate", str(output), "--max-cost", "0.9"], ["evaluate", str(output)]):
        monkeypatch.setattr("sys.argv", ["mevit", *options, "--data", str(folder)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
    before = contents(output)
    assert json.loads(before["config.json"])["early_exit"]
    again()
    assert contents(output) == before
    (output / "README.md").unlink()
    again()
    assert contents(output) == before


@pytest.mark.slow
def test_exits_are_measured_as_the_saved_model_combines_them(finished, run_again):
    output, again = run_again
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "exit_combination": "mean"}))
    again("--license", "mit")  # which renders the card anew
    card = ModelCard.load(output / "README.md")
    assert card.data.eval_results is None and "## Results" not in card.text
    (output / "metrics.json").unlink()
    metrics = again()
    assert metrics["exit_combination"] == "mean"
    for row, alone in zip(metrics["exits"][1:], finished[1]["exits"][1:], strict=True):
        assert row["cost"] > alone["cost"] and row["parameters"] > alone["parameters"]  # of the heads passed
    card = ModelCard.load(output / "README.md")
    assert len(card.data.eval_results) == 3 and "## Results" in card.text


@pytest.mark.slow
def test_the_licence_can_be_given_later(run_again):
    output, again = run_again
    again("--license", "mit")
    assert ModelCard.load(output / "README.md").data.license == "mit"
    assert json.loads((output / "metrics.json").read_text())["card"]["license"] == "mit"


def test_bfloat16_is_timed_against_float32(monkeypatch):
    times = {torch.float32: [0.2, 0.1, 0.3], torch.bfloat16: [0.9, 0.5, 0.4]}
    monkeypatch.setattr(timeit, "repeat", lambda product, **settings: times[product().dtype])
    state = torch.get_rng_state()
    assert train.slowdown_of_bfloat16() == pytest.approx(4)
    assert state.equal(torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("slowdown", [0.6, 60.04])
def test_evaluation_is_in_the_precision_of_the_checkpoint(folder, tmp_path, monkeypatch, caplog, slowdown):
    monkeypatch.setattr(train, "slowdown_of_bfloat16", lambda: slowdown)
    evaluated = []
    predict_splits = run_results.predict_splits
    monkeypatch.setattr(
        run_results, "predict_splits", lambda run, model: evaluated.append(model) or predict_splits(run, model)
    )
    output = tmp_path / "run"
    command = [config_file(tmp_path, max_steps=2), "--dataset", str(folder), "--output_dir", str(output)]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # for the test alone; the arguments write it
    metrics = train.main([*command, "--bf16", "true"])
    assert metrics["recipe"]["mixed_precision"] == "bf16"
    told = "take 60.0 times as long in bfloat16 as in float32 on this processor"
    assert (told in caplog.text) == (slowdown > 1)
    pixel_values = torch.randn(8, 3, 16, 16)
    saved = AutoModelForImageClassification.from_pretrained(output).eval()
    with torch.no_grad():
        assert evaluated[0](pixel_values).exit_logits.equal(saved(pixel_values).exit_logits)


@pytest.mark.slow
def test_two_processes_train_and_the_main_one_writes(folder, tmp_path):
    output = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "training/train.py",
    ]
    command += [config_file(tmp_path, max_steps=2), "--dataset", str(folder), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| exit | validation accuracy | test accuracy | cost | parameters |") == 1
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["recipe"]["num_processes"] == 2 and metrics["num_samples"]["test"] == 18
    assert (output / "README.md").is_file()


def test_options_win_over_the_file(tmp_path):
    config = config_file(tmp_path, exit_layers=[1, 3], learning_rate="1e-3", num_train_epochs=None)
    arguments = train.parse([config, "--image_size", "32"])
    assert arguments.data.image_size == 32
    assert arguments.model.exit_layers == [1, 3]
    assert arguments.model.model_config == SHAPE
    assert arguments.training.learning_rate == 1e-3
    assert arguments.training.num_train_epochs == 3  # the default
    assert train.parse([config, "--exit_layers", "2", "3"]).model.exit_layers == [2, 3]
    assert train.parse([config, "--model_config", '{"patch_size": 2}']).model.model_config == {"patch_size": 2}


def test_exits_are_combined_by_a_field_of_the_model_config(tmp_path):
    shape = {**SHAPE, "exit_combination": "mean"}
    arguments = train.parse([config_file(tmp_path), "--model_config", json.dumps(shape)])
    assert train.make_model(arguments, ["crimson", "indigo", "teal"]).config.exit_combination == "mean"


def test_a_config_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.read_config("demo.yaml")["dataset"] == "demo"
    (tmp_path / "demo.yaml").write_text("dataset: mine\n")
    assert settings.read_config("demo.yaml")["dataset"] == "mine"
    with pytest.raises(ValueError, match="a config must be a YAML file or one of .*demo.yaml.*, got nothing.yaml"):
        settings.read_config("nothing.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learnin_rate": 1, "epochs": 2}, "epochs, learnin_rate is not a setting of train.py"),
        ({"exit_layers": 12}, "exit_layers must be a list, got 12"),
        ({"exit_layers": [1, "a", None]}, r"exit_layers must be a list of whole numbers, got \[1, 'a', None\]"),
        ({"image_size": 16.5}, "image_size must be a whole number, got 16.5"),
        ({"learning_rate": [1]}, r"learning_rate must be a number, got \[1\]"),
        ({"learning_rate": True}, "learning_rate must be a number, got True"),
        ({"architecture": "vgg"}, "architecture must be one of mevit, transfg, got 'vgg'"),
        ({"model_config": [1]}, r"model_config must be a mapping of names to values, got \[1\]"),
    ],
)
def test_bad_settings_of_a_file_are_named(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        train.parse([config_file(tmp_path, **given)])


def test_images_that_trained_the_backbone_are_remembered(folder, tmp_path):
    other = encode_digests(["0" * 64])
    model = tiny_model(exit_layers=[4], training_images=other)
    model.save_pretrained(tmp_path / "plain")
    image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3, resize_size=20).save_pretrained(
        tmp_path / "plain"
    )
    options = ["--dataset", str(folder), "--output_dir", str(tmp_path / "run"), "--backbone", str(tmp_path / "plain")]
    file = config_file(tmp_path, model_config={}, exit_layers=[2, 4])
    trainer = train.prepare(train.parse([file, *options])).trainer
    train.remember_training_images(trainer)
    assert trainer.model.config.training_images == encode_digests(trainer.train_dataset.image_hashes, other)
    assert count_known(["0" * 64], trainer.model.config.training_images) == 1


def test_the_papers_reading_is_one_config_away(tmp_path):
    paper = train.parse(["paper.yaml", "--dataset", "mine", "--output_dir", str(tmp_path)])
    assert paper.data.dataset == "mine" and paper.model.model_config["uncertainty_input"] == "logits"
    assert paper.training.exit_learning_rate is None  # that of the backbone
    default = MEViTTrainingArguments(str(tmp_path), report_to="none")
    for name in (*run_results.SANDWICH_SETTINGS, "standardize_exits"):
        assert getattr(paper.training, name) == getattr(default, name), name


def test_sgd_gets_its_momentum(folder, tmp_path):
    command = [config_file(tmp_path), "--dataset", str(folder), "--output_dir", str(tmp_path / "run")]
    sgd = [*command, "--optim", "sgd", "--optim_args", "momentum=0.8, nesterov=true", "--exit_learning_rate", "0.5"]
    groups = train.prepare(train.parse(sgd)).trainer.create_optimizer().param_groups
    assert {(group["momentum"], group["nesterov"]) for group in groups} == {(0.8, True)}
    assert {group["lr"] for group in groups} == {0.003, 0.5}
    (adam, *_) = train.prepare(train.parse(command)).trainer.create_optimizer().param_groups
    assert "momentum" not in adam


@pytest.mark.parametrize("name", ["demo", "fgvc_aircraft", "finetune", "grocery_store", "paper", "stanford_cars"])
def test_every_config_is_understood_from_any_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments = train.parse([f"{name}.yaml"])
    assert arguments.training.output_dir == f"runs/{name}"
    if name in ("fgvc_aircraft", "stanford_cars"):
        assert arguments.model.backbone == "google/vit-base-patch16-224-in21k"
        assert arguments.data.dataset.startswith("Donghyun99/")
        assert arguments.data.image_size == 448
        optimizer, options = train.sgd_with_arguments(arguments.training)
        assert optimizer is torch.optim.SGD
        assert options == {"lr": 0.001 if name == "fgvc_aircraft" else 0.003, "momentum": 0.9}
        random_start = train.RunArguments(train.ModelArguments(), arguments.data, arguments.training)
        processor = train.make_image_processor(random_start)
        assert processor.size["height"] == 600 and len(train_transform(processor).transforms) > 3
    if name == "finetune":
        # 500 or 50,000 images: warm-up and logs are fractions of all steps
        assert arguments.training.get_warmup_steps(320) == 32
        assert arguments.training.get_warmup_steps(31_000) == 3100
        assert 0 < arguments.training.logging_steps < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit_layers", "1", "4"], r"exit_layers must be ascending layer numbers from 1 to 3, .* got \[1, 4\]"),
        (["--image_size", "18"], "image_size must be a positive multiple of patch_size=4, got 18"),
        (["--dataset", "/no/such/folder"], "/no/such/folder"),
        (["--learnin_rate", "1"], "--learnin_rate 1 is not an option of train.py"),
        (["--num_random_exits", "-1"], "num_random_exits must be 0 or more, got -1"),
        (["--dataset", ""], "the data set's name is empty"),
        (["--model_config", "{bad"], "model_config must be JSON, got {bad"),
        (["--model_config", '{"hidden_siz": 32}'], "MEViTConfig has no field hidden_siz"),
        (
            ["--resume_from_checkpoint", "/no/checkpoint"],
            "resume_from_checkpoint must be a checkpoint .*, got /no/checkpoint",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(folder, tmp_path, options, message):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train.main([config_file(tmp_path), "--dataset", str(folder), "--output_dir", str(output), *options])
    assert not output.exists()


def test_bad_input_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", config_file(tmp_path), "--dataset", "/no/such/folder"])
    with pytest.raises(SystemExit, match=r"^train.py: error: .*/no/such/folder.*$"):
        train.command_line()
    monkeypatch.setattr("sys.argv", ["train.py", "/no/such/config.yaml"])
    with pytest.raises(SystemExit, match="^train.py: error: .*/no/such/config.yaml"):
        train.command_line()


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_a_token_is_refused_in_one_line_that_does_not_repeat_it(tmp_path, monkeypatch, name):
    config, dashed = config_file(tmp_path), name.replace("_", "-")
    given = {"as an option": [[f"--{name}", "hf_secret"], [f"--{name}=hf_secret"], [f"--{dashed}", "hf_secret"]]}
    given["in a file"] = [[]]
    for where, options in given.items():
        if where == "in a file":
            config = config_file(tmp_path, **{name: "hf_secret"})
        for own in options:
            monkeypatch.setattr("sys.argv", ["train.py", config, *own, "--output_dir", str(tmp_path / "run")])
            with pytest.raises(SystemExit) as stopped:
                train.command_line()
            assert stopped.value.code == (
                f"train.py: error: {name} is given {where}, where others can read it; log in with `hf auth login`, or "
                f"set the environment variable HF_TOKEN"
            )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"{name} is given as an option"):
        train.settings_parser().given([f"--{name}", "hf_secret"])


def test_a_token_that_is_none_is_no_token(tmp_path):
    assert train.parse([config_file(tmp_path, hub_token=None), "--run_name", "hub_token"]).training.hub_token is None


@pytest.mark.slow
def test_the_script_without_accelerate_ends_with_one_line(tmp_path):
    blocked = tmp_path / "sitecustomize.py"  # Python imports it before the script
    blocked.write_text("import importlib.util as u\nf = u.find_spec\n")
    with blocked.open("a") as file:
        file.write("u.find_spec = lambda name, *rest: None if name == 'accelerate' else f(name, *rest)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "training/train.py", config_file(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "train.py: error: training needs accelerate, not installed here: pip install 'mevit[train]'\n"
    )


def test_what_is_not_installed_ends_with_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["training/train.py", "demo.yaml"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("accelerate", "yaml") else "found")
    monkeypatch.delitem(sys.modules, "check_installed")
    message = r"^train.py: error: training needs accelerate, yaml, not installed here: pip install 'mevit\[train\]'$"
    with pytest.raises(SystemExit, match=message):
        importlib.import_module("check_installed")


def test_a_file_without_settings_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("- demo\n")
    with pytest.raises(ValueError, match="config.yaml must hold a mapping"):
        train.main([str(tmp_path / "config.yaml")])


@pytest.mark.slow
@pytest.mark.skipif("MEVIT_SHARED" not in os.environ, reason="MEVIT_SHARED names no folder with the real images")
@pytest.mark.parametrize(
    ("dataset", "num_labels", "num_test"),
    [("stanford_cars", 196, 1305), ("grocery_store", 81, 2485)],  # of Stanford Cars the part held out from train
)
def test_trains_on_real_images_from_a_real_backbone(tmp_path, monkeypatch, dataset, num_labels, num_test):
    monkeypatch.setattr("modeling_mevit.trainer.IMAGES_TO_STANDARDIZE", 32)
    shared = Path(os.environ["MEVIT_SHARED"])
    backbone = shared / "models" / "vit-small-patch14-dinov2"
    run = train.prepare(
        train.parse(
            [
                "grocery_store.yaml",
                *("--dataset", str(shared / "data" / dataset), "--backbone", str(backbone)),
                *("--output_dir", str(tmp_path), "--max_steps", "2", "--per_device_train_batch_size", "4"),
                *("--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"),
            ]
        )
    )
    trainer = run.trainer
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2 and all(np.isfinite(entry["loss"]) for entry in log)
    assert trainer.model.config.num_labels == num_labels
    assert len(run.test_set) == num_test


@pytest.mark.slow
def test_transfg_trains_with_the_same_script_and_resumes(folder, tmp_path):
    shape = {**SHAPE, "patch_stride": 3}
    config = config_file(tmp_path, model_config=shape, exit_learning_rate=0.01, standardize_exits=True)
    arguments = [config, "--dataset", str(folder), "--architecture", "transfg", "--output_dir"]
    metrics = train.main([*arguments, str(tmp_path / "whole")])
    (row,) = metrics["exits"]
    assert row["exit"] == 3
    assert row["test_accuracy"] > 0.6
    assert row["cost"] > 1
    assert "num_random_exits" not in metrics["recipe"]
    assert metrics["recipe"]["architecture"] == "transfg" and "exit_combination" not in metrics
    assert (tmp_path / "whole" / "README.md").is_file()

    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    assert train.main([*arguments, str(tmp_path / "resumed")])["training_seconds"] is None  # as of an interrupted run
    whole, resumed = (load_file(tmp_path / directory / "model.safetensors") for directory in ("whole", "resumed"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)
