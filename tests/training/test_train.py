# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The training script on a small folder of images: everything that a run promises to write and to survive."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel, pipeline

from modeling_mevit import cli
from modeling_mevit.data import load_splits, train_transform
from tests.helpers.images import write_colours
from training import train


ROOT = Path(__file__).parents[2]
COLOURS = {"crimson": (200, 20, 60), "indigo": (75, 0, 130), "teal": (0, 128, 128)}
SIZES = {"train": 12, "validation": 4, "test": 6}

SETTINGS = {
    "image_size": 16,
    "resize_size": 20,
    "exit_layers": [1, 2, 3],
    "model_config": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": 4,
    },
    "learning_rate": 0.003,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 6,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "seed": 0,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Noise around one colour a class, in ImageFolder layout."""
    return write_colours(tmp_path_factory.mktemp("colours"), COLOURS, SIZES, deviation=40, shape=(22, 26))


def config_file(directory: Path, **settings) -> str:
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, **settings}))
    return str(file)


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory) -> tuple[Path, dict]:
    """Output directory and metrics of a whole run."""
    directory = tmp_path_factory.mktemp("run")
    output = directory / "colours-mevit"
    return output, train.main([config_file(directory), "--dataset", str(folder), "--output_dir", str(output)])


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


def test_metrics_are_of_every_exit(finished):
    _, metrics = finished
    assert metrics["num_samples"] == {"train": 36, "validation": 12, "test": 18}
    assert [row["exit"] for row in metrics["exits"]] == [1, 2, 3]
    costs = [row["cost"] for row in metrics["exits"]]
    assert costs == sorted(costs) and 0.7 < costs[-1] < 1  # the last layer is computed for [CLS] alone
    parameters = [row["parameters"] for row in metrics["exits"]]
    assert parameters[1] - parameters[0] == parameters[2] - parameters[1] > 0
    assert metrics["recipe"]["learning_rate"] == 0.003
    assert metrics["dataset"].startswith("colours") and "/" not in metrics["dataset"]


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


def test_prints_the_table(folder, tmp_path, capsys):
    config = config_file(tmp_path, max_steps=1)
    metrics = train.main([config, "--dataset", str(folder), "--output_dir", str(tmp_path / "run")])
    table = capsys.readouterr().out
    assert "| exit | validation accuracy | test accuracy | cost | parameters |" in table
    row = metrics["exits"][0]
    assert f"| 1 | {row['validation_accuracy']:.1%} | {row['test_accuracy']:.1%} | {row['cost']:.3f} |" in table


def test_the_saved_processor_and_model_reproduce_the_accuracy_of_every_exit(finished, folder):
    output, metrics = finished
    classify = pipeline("image-classification", str(output))
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


def test_one_exit_is_the_plain_vit(folder, tmp_path):
    config = config_file(tmp_path, max_steps=2)
    options = ["--dataset", str(folder), "--output_dir", str(tmp_path / "run")]
    metrics = train.main([config, *options, "--exit_layers", "3", "--uncertainty_weight", "0"])
    assert [row["exit"] for row in metrics["exits"]] == [3]
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert all(entry["loss"] == pytest.approx(entry["loss_cross_entropy/exit_3"], abs=1e-3) for entry in steps)
    assert not any("distillation" in name for name in steps[0])


def test_starts_from_a_backbone(folder, tmp_path):
    backbone = ViTModel(ViTConfig(**SETTINGS["model_config"], image_size=32))
    backbone.save_pretrained(tmp_path / "backbone")
    mean_and_std = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "backbone" / "preprocessor_config.json").write_text(json.dumps(mean_and_std))
    config = config_file(tmp_path, max_steps=1, model_config=None, learning_rate=0.0)
    options = ["--dataset", str(folder), "--output_dir", str(tmp_path / "run")]
    metrics = train.main([config, *options, "--backbone", str(tmp_path / "backbone")])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    name = "embeddings.cls_token"
    assert model.vit.state_dict()[name].equal(backbone.state_dict()[name])
    processor = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert {key: processor[key] for key in mean_and_std} == mean_and_std
    assert metrics["recipe"]["backbone"] == "backbone"


def test_a_backbone_without_an_image_processor_is_named(folder, tmp_path):
    ViTModel(ViTConfig(**SETTINGS["model_config"], image_size=32)).save_pretrained(tmp_path / "backbone")
    config = config_file(tmp_path, max_steps=1, model_config=None)
    options = ["--dataset", str(folder), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="backbone has no image processor that names .* --normalization imagenet"):
        train.main([config, *options, "--backbone", str(tmp_path / "backbone")])
    train.prepare(
        *train.parse([config, *options, "--backbone", str(tmp_path / "backbone"), "--normalization", "imagenet"])
    )


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


@pytest.mark.parametrize("options", [["--hub_model_id", "someone/colours"], []], ids=["named", "unnamed"])
def test_pushes_to_the_hub_as_the_librarys_examples_do(folder, tmp_path, monkeypatch, options):
    uploads, repositories = [], []
    output = tmp_path / "colours"

    class Done:
        repo_id, is_done = "someone/colours", lambda self: True

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def create_repo(repo_id, **kwargs):
        repositories.append(repo_id)
        return Done()

    def upload_folder(**kwargs):
        uploads.append({**kwargs, "files": {path.name for path in Path(kwargs["folder_path"]).iterdir()}})
        return Done()

    for function in (create_repo, upload_folder):  # Transformers 5 calls the client's methods, 4 has names of its own
        monkeypatch.setattr(
            HfApi, function.__name__, lambda self, *args, call=function, **kwargs: call(*args, **kwargs)
        )
        monkeypatch.setattr(f"transformers.trainer.{function.__name__}", function, raising=False)
    config = config_file(tmp_path, max_steps=2, save_strategy="no")
    train.main([config, "--dataset", str(folder), "--output_dir", str(output), "--push_to_hub", "true", *options])

    assert repositories == ["someone/colours" if options else "colours"]
    last = uploads[-1]
    assert last["repo_id"] == "someone/colours"
    assert last["files"] >= {"model.safetensors", "modeling_mevit.py", "config.json", "README.md", "metrics.json"}
    card = (output / "README.md").read_text()
    assert 'from_pretrained("someone/colours", trust_remote_code=True)' in card


def test_a_finished_run_is_evaluated_again_and_not_trained_further(folder, tmp_path):
    config = config_file(tmp_path, max_steps=4, save_steps=2, lr_scheduler_type="constant")
    command = [config, "--dataset", str(folder), "--output_dir", str(tmp_path / "run")]
    first = train.main(command)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    second = train.main(command)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert second["exits"] == first["exits"]
    assert second["training_seconds"] is None and first["training_seconds"] > 0
    checkpoint = str(tmp_path / "run" / "checkpoint-4")  # of 6 steps an epoch
    for options, finished in (
        (["--max_steps", "4"], True),
        (["--max_steps", "5"], False),
        (["--max_steps", "-1"], False),
    ):
        assert train.training_is_complete(checkpoint, train.parse([config, *options])[2]) is finished


def test_a_calibration_outlives_the_evaluation_of_a_finished_run(folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    command = [config_file(tmp_path), "--dataset", str(folder), "--output_dir", str(output)]
    train.main(command)
    for options in (["calibrate", str(output), "--max-cost", "0.9"], ["evaluate", str(output)]):
        monkeypatch.setattr("sys.argv", ["mevit", *options, "--data", str(folder)])
        with pytest.raises(SystemExit):
            cli.main()
    before = {name: (output / name).read_text() for name in ("config.json", "README.md")}
    assert json.loads(before["config.json"])["early_exit"] and "## Early exit, measured" in before["README.md"]
    train.main(command)
    kept, wanted = json.loads((output / "config.json").read_text()), json.loads(before["config.json"])
    for name in ("early_exit", "exit_policy", "exit_thresholds", "patience", "calibration", "exit_layers", "auto_map"):
        assert kept[name] == wanted[name]
    assert (output / "README.md").read_text() == before["README.md"]


def test_local_names_keep_their_place_to_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    assert train.public_name("~/photos") == train.public_name(str(tmp_path / "photos")) == "photos"
    assert train.public_name("Donghyun99/Stanford-Cars") == "Donghyun99/Stanford-Cars"


def test_options_win_over_the_file(tmp_path):
    config = config_file(tmp_path, exit_layers=[1, 3], learning_rate="1e-3")
    model_arguments, data_arguments, training_arguments = train.parse([config, "--image_size", "32"])
    assert data_arguments.image_size == 32
    assert model_arguments.exit_layers == [1, 3]
    assert json.loads(model_arguments.model_config) == SETTINGS["model_config"]
    assert training_arguments.learning_rate == 1e-3
    model_arguments, _, _ = train.parse([config, "--exit_layers", "2", "3"])
    assert model_arguments.exit_layers == [2, 3]


@pytest.mark.parametrize("name", ["demo", "fgvc_aircraft", "grocery_store", "stanford_cars"])
def test_every_config_is_understood(name):
    model_arguments, data_arguments, training_arguments = train.parse([str(ROOT / f"training/configs/{name}.yaml")])
    assert training_arguments.output_dir == f"runs/{name}"
    if name in ("fgvc_aircraft", "stanford_cars"):
        assert model_arguments.backbone == "google/vit-base-patch16-224-in21k"
        assert data_arguments.dataset.startswith("Donghyun99/")
        assert (data_arguments.image_size, training_arguments.optim, training_arguments.sgd_momentum) == (
            448,
            "sgd",
            0.9,
        )
        processor = train.make_image_processor(train.ModelArguments(), data_arguments)
        assert processor.size["height"] == 600 and len(train_transform(processor).transforms) > 3
        assert training_arguments.learning_rate == (0.001 if name == "fgvc_aircraft" else 0.003)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit_layers", "1", "4"], r"exit_layers=\[1, 4\] is out of range for 3 encoder layers"),
        (["--image_size", "18"], "image_size=18 cannot be cut into patches of patch_size=4"),
        (["--dataset", "/no/such/folder"], "/no/such/folder"),
        (["--normalization", "none"], "normalization='none' is neither 'backbone' nor 'imagenet'"),
        (["--learnin_rate", "1"], "--learnin_rate 1 is no option of train.py"),
        (["--num_random_exits", "-1"], "num_random_exits=-1 is negative"),
        (["--dataset", ""], "the data set's name is empty"),
        (["--model_config", "{bad"], "model_config={bad is no JSON"),
        (["--model_config", '{"hidden_siz": 32}'], "hidden_siz is no field of MEViTConfig"),
        (["--resume_from_checkpoint", "/no/checkpoint"], "resume_from_checkpoint=/no/checkpoint is no checkpoint"),
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


def test_a_file_without_settings_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("- demo\n")
    with pytest.raises(ValueError, match="config.yaml holds no mapping"):
        train.main([str(tmp_path / "config.yaml")])


@pytest.mark.skipif("MEVIT_SHARED" not in os.environ, reason="MEVIT_SHARED names no folder with the real photos")
@pytest.mark.parametrize("dataset", ["stanford_cars", "grocery_store"])
def test_trains_on_real_photos_from_a_real_backbone(tmp_path, dataset):
    shared = Path(os.environ["MEVIT_SHARED"])
    backbone = shared / "models" / "vit-small-patch14-dinov2"
    model_arguments, data_arguments, training_arguments = train.parse(
        [
            str(ROOT / "training/configs/grocery_store.yaml"),
            *("--dataset", str(shared / "data" / dataset), "--backbone", str(backbone)),
            *("--output_dir", str(tmp_path), "--max_steps", "2", "--per_device_train_batch_size", "4"),
            *("--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"),
        ]
    )
    trainer, test_set = train.prepare(model_arguments, data_arguments, training_arguments)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2 and all(np.isfinite(entry["loss"]) for entry in log)
    splits = load_splits(shared / "data" / dataset)
    assert trainer.model.config.num_labels == {"stanford_cars": 196, "grocery_store": 81}[dataset]
    assert len(test_set) == len(splits["test"])


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    """What `make demo` does: every exit at three times chance at least, the last one above 80 %."""
    command = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count())]
    command += ["training/train.py", "training/configs/demo.yaml", "--output_dir", str(tmp_path / "demo")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    accuracies = [row["test_accuracy"] for row in metrics["exits"]]
    assert min(accuracies) >= 3 / 12
    assert accuracies[-1] > 0.8
    assert "| exit | validation accuracy | test accuracy | cost | parameters |" in result.stdout

    pytest.importorskip("optimum.exporters.onnx", reason="needs the extra mevit[onnx]")
    mevit = [str(Path(sys.executable).with_name("mevit"))]
    checkpoint, int8 = str(tmp_path / "demo"), str(tmp_path / "int8")
    export = [*mevit, "export", checkpoint, int8, "--quantize", "int8", "--data", "demo", "--split", "test"]
    result = subprocess.run(export, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "int8" / "precision.json").read_text())
    assert report["images"] == 600 and set(report["accuracy"]) == {f"exit_{k}.onnx" for k in (3, 4, 5)} | {
        "model.onnx"
    }
    for row, accuracy in zip(metrics["exits"], sorted(report["accuracy"].items()), strict=True):
        name, of = accuracy
        assert of["float32"] == pytest.approx(row["test_accuracy"], abs=0.004), name
        assert of["int8"] >= of["float32"] - 0.01, name


def test_transfg_trains_with_the_same_script_and_resumes(folder, tmp_path):
    shape = {**SETTINGS["model_config"], "patch_stride": 3}
    config = config_file(tmp_path, model_config=shape, exit_learning_rate=0.01, standardize_exits=True)
    arguments = [config, "--dataset", str(folder), "--architecture", "transfg", "--output_dir"]
    metrics = train.main([*arguments, str(tmp_path / "whole")])
    (row,) = metrics["exits"]
    assert row["exit"] == 3
    assert row["test_accuracy"] > 0.6
    assert row["cost"] > 1
    assert "num_random_exits" not in metrics["recipe"]
    assert metrics["recipe"]["architecture"] == "transfg"
    assert (tmp_path / "whole" / "README.md").is_file()

    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    assert train.main([*arguments, str(tmp_path / "resumed")])["training_seconds"] is None  # as of an interrupted run
    whole, resumed = (load_file(tmp_path / directory / "model.safetensors") for directory in ("whole", "resumed"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)
