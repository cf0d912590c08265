# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are saved in place, damaged, or out of reach."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from modeling_mevit import MEViTConfig, MEViTForImageClassification, hub
from modeling_mevit import checkpoint as module
from modeling_mevit.atomic import locked
from modeling_mevit.checkpoint import check_export_of, load_model, save_calibrated
from tests.helpers.models import TINY


ROOT = Path(module.__file__).parents[1]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def changed_model(checkpoint: Path) -> MEViTForImageClassification:
    model = load_model(str(checkpoint), "cpu")
    model.config.exit_thresholds, model.config.early_exit = [0.25, 0.25], True
    return model


@pytest.mark.parametrize("kind", ["error", "SIGKILL"])
def test_a_save_that_stops_anywhere_leaves_whole_files(checkpoint, tmp_path, kind):
    """Each save in a process of its own, which stops at the first, second, … renaming or write to the disk."""
    (checkpoint / "modeling_mevit.py").write_text("raise ImportError('an older model')\n")
    (checkpoint / "README.md").unlink(missing_ok=True)
    # forked from a process that has only imported, and so has no threads that a fork would lose
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    model, before = changed_model(checkpoint), contents(checkpoint)
    whole = shutil.copytree(checkpoint, tmp_path / "whole" / "checkpoint")
    save_calibrated(model, str(whole), whole)
    after, states = contents(whole), []
    for step in range(100):
        copy = shutil.copytree(checkpoint, tmp_path / str(step) / "checkpoint")
        process = processes.Process(target=_save_and_stop, args=(copy, step, kind), daemon=True)
        process.start()
        process.join(timeout=300)
        assert process.exitcode in (0, -signal.SIGKILL if kind == "SIGKILL" else 1)
        left = contents(copy)
        assert all(left[name] in (before.get(name), after[name]) for name in left)
        assert left.keys() >= before.keys()
        if left.get("README.md") == after["README.md"]:
            assert left["config.json"] == after["config.json"]
        if left["config.json"] == after["config.json"]:
            assert left["modeling_mevit.py"] == after["modeling_mevit.py"]
        states.append(left)
        with locked(copy):
            save_calibrated(model, str(copy), copy)
        assert contents(copy) == after and not (copy / ".cache").exists()
        if process.exitcode == 0:
            break
    assert states[0] == before and states[-1] == after and len(states) > 5


def _save_and_stop(directory: Path, step: int, kind: str) -> None:
    model = changed_model(directory)
    steps = iter(range(step, -1, -1))

    def stopping(function):
        def stops(*arguments):
            if next(steps, -1) == 0:
                if kind == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments)

        return stops

    os.replace, os.fsync = stopping(os.replace), stopping(os.fsync)
    save_calibrated(model, str(directory), directory)


def test_calibrating_a_checkpoint_of_links_leaves_what_they_lead_to(mevit, checkpoint, photos, tmp_path):
    """The layout of the Hub's cache, whose blobs are named by their content."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    shutil.copytree(checkpoint, blobs)
    before = contents(blobs)
    for name in before:
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert mevit("calibrate", snapshot, "--data", photos, "--max-cost", "0.6")[0] == 0
    assert mevit("evaluate", snapshot, "--data", photos)[0] == 0
    assert contents(blobs) == before
    assert json.loads((snapshot / "config.json").read_text())["early_exit"]
    assert (snapshot / "model.safetensors").is_symlink() and not (snapshot / ".cache").exists()


@pytest.mark.parametrize("command", [("calibrate", "--max-cost", "0.6"), ("evaluate",)])
def test_two_commands_do_not_write_to_one_directory(mevit, checkpoint, photos, command):
    before = contents(checkpoint)
    name, *options = command
    with locked(checkpoint):
        code, _ = mevit(name, checkpoint, "--data", photos, *options)
    assert code.startswith(f"mevit: error: another mevit command is writing to {checkpoint}")
    assert contents(checkpoint) == before
    assert mevit(name, checkpoint, "--data", photos, *options)[0] == 0


# What cannot be loaded


def test_pickled_weights_are_not_read(mevit, checkpoint, photos, tmp_path):
    plain = tmp_path / "plain"
    MEViTForImageClassification.from_pretrained(checkpoint).to_vit().save_pretrained(plain)
    shutil.copy(checkpoint / "preprocessor_config.json", plain)
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return (trap.write_text, ("sprung",))

    torch.save({**load_file(plain / "model.safetensors"), "trap": Trap()}, plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    code, _ = mevit("evaluate", checkpoint, "--data", photos, "--plain", plain)
    assert "no file named model.safetensors" in code and "\n" not in code
    assert not trap.exists() and not (checkpoint / "evaluation.json").exists()


@pytest.mark.parametrize("file", ["preprocessor_config.json", "config.json"])
def test_code_of_a_checkpoint_is_not_run(mevit, checkpoint, photos, tmp_path, monkeypatch, file):
    """Not even where whoever is asked says yes, which a pipe may do."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    trap = tmp_path / "trap"
    (checkpoint / "evil.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    named = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    if file == "config.json":
        named = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    content = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps({**content, **named}))
    code, _ = mevit("predict", checkpoint, photos / "test" / "teal" / "0.png")
    assert code.startswith("mevit: error: ") and "trust_remote_code" in code and "\n" not in code
    assert not trap.exists()


def test_weights_that_do_not_fit_the_config(mevit, checkpoint, photos):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    code, _ = mevit("predict", checkpoint, photos / "test" / "teal" / "0.png")
    assert code.startswith(f"mevit: error: the weights of {checkpoint} do not fit its config.json: ")
    assert "\n" not in code


@pytest.mark.parametrize(
    "content",
    [
        *("{not json", "[1]", '"text"', "", {"hidden_size": "many"}, {"image_size": []}),
        {"quantization_config": "size"},
    ],
)
def test_a_config_that_is_malformed(mevit, checkpoint, photos, content):
    if isinstance(content, dict):
        content = json.dumps({**json.loads((checkpoint / "config.json").read_text()), **content})
    (checkpoint / "config.json").write_text(content)
    code, _ = mevit("predict", checkpoint, photos / "test" / "teal" / "0.png")
    assert isinstance(code, str) and re.match("mevit: error: .*", code) and "\n" not in code
    assert str(checkpoint) in code or "size" in code


SILENT = """
import sys, time
from modeling_mevit.cli import main
started = time.monotonic()
try:
    main()
except SystemExit as stopped:
    print(stopped.code)
print(time.monotonic() - started, "torch" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize("plain", [False, True])
def test_a_hub_that_cannot_be_reached(tmp_path, listens, plain):
    """The Hub is a port that never answers, or one that refuses; neither loads anything heavy."""
    arguments = ["predict", "no/such-model", "x.jpg"]
    if plain:
        arguments = ["evaluate", str(tmp_path), "--data", "demo", "--plain", "no/such-model"]
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if listens:
            port.listen(50)
        environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", SILENT, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    message, seconds, torch_is_loaded = re.fullmatch(r"(.*)\n(\S+) (True|False)\n", done.stdout).groups()
    where = "no/such-model is neither a local directory nor in the Hub's cache"
    assert message == f"mevit: error: the Hub cannot be reached, and {where}."
    assert float(seconds) < 8 and torch_is_loaded == "False" and "Traceback" not in done.stderr


def test_what_the_hub_s_cache_holds_is_used_where_the_hub_does_not_answer(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "answers", lambda name: False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: str(checkpoint / file))
    assert load_model("in-the/cache", "cpu").config.exit_layers == [2, 3, 4]
    assert module.load_image_processor("in-the/cache").crop_size["height"] == 16


# README


def test_the_snippet_of_the_readme_sees_what_predict_sees(mevit, checkpoint, tmp_path, monkeypatch):
    """On an image that has to be turned, which another side up gives other logits."""
    weights = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {name: weight + 0.2 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    (tmp_path / "runs").mkdir()
    shutil.copytree(checkpoint, tmp_path / "runs" / "demo")
    save_file(noisy, tmp_path / "runs" / "demo" / "model.safetensors", metadata={"format": "pt"})
    grey = np.random.default_rng(1).integers(0, 65536, (16, 16), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg", exif=exif, quality=100)
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    snippet = re.search(r"## Use\n\n```python\n(.*?outputs = model\(pixel_values\)\n)", readme, re.DOTALL)
    for file in ("grey.png", "image.jpg"):
        names: dict = {}
        exec(snippet[1].replace("image.jpg", file), names)
        probability, label = names["outputs"].logits.softmax(-1)[0].max(-1)
        answer = mevit("predict", "runs/demo", file)[1].strip().split("\t")
        assert answer[1:3] == [names["model"].config.id2label[label.item()], f"{probability:.3f}"]
    sideways = names["image_processor"](Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
    assert not torch.allclose(names["model"](sideways).logits, names["outputs"].logits, atol=1e-3)
    assert type(names["model"]) is type(AutoModelForImageClassification.from_pretrained("runs/demo"))


def test_an_export_is_of_a_checkpoint_whose_exits_are_combined_alike(tmp_path):
    config = MEViTConfig(**TINY, exit_thresholds=0.5, early_exit=True)
    config.save_pretrained(tmp_path)
    (tmp_path / "cascade.json").write_text("{}")
    check_export_of(config, tmp_path)
    config.exit_combination = "mean"
    with pytest.raises(ValueError, match="must be of the checkpoint as it is calibrated now; export it again"):
        check_export_of(config, tmp_path)


@pytest.mark.parametrize("fields", [{"max_disagreement": 0.02}, {"max_accuracy_drop": 0.02, "bound": "harm"}])
def test_an_export_has_the_target_of_an_older_checkpoint_that_leaves_out_what_a_confidence_implies(tmp_path, fields):
    config = MEViTConfig(**TINY, exit_thresholds=0.5, early_exit=True)
    config.calibration = {"target": {**fields, "confidence": 0.95, "guarantee": "probability"}}
    config.save_pretrained(tmp_path)
    (tmp_path / "cascade.json").write_text("{}")
    config.calibration = {"target": {**fields, "confidence": 0.95}}
    check_export_of(config, tmp_path)
    config.calibration = {"target": {**fields, "confidence": 0.9}}
    with pytest.raises(ValueError, match="must be of the checkpoint as it is calibrated now; export it again"):
        check_export_of(config, tmp_path)
