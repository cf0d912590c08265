# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The runtime that needs numpy and onnxruntime alone."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from modeling_mevit import MEViTConfig
from modeling_mevit.onnx import cascade_mevit
from modeling_mevit.onnx.cascade_mevit import Cascade
from tests.helpers.models import TINY


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """A copy of the export, which a test may damage."""
    return shutil.copytree(exported, tmp_path / "copied")


def test_runs_where_neither_torch_nor_transformers_can_be_imported(exported, calibrated_model, image_file, tmp_path):
    program = tmp_path / "without.py"
    lines = [
        "import runpy, sys",
        "for name in ('torch', 'transformers', 'optimum', 'modeling_mevit'):",
        "    sys.modules[name] = None",
        f"sys.argv = ['cascade_mevit.py', {str(exported)!r}, {str(image_file)!r}]",
        f"runpy.run_path({str(exported / 'cascade_mevit.py')!r}, run_name='__main__')",
    ]
    program.write_text("\n".join(lines))
    answer = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout
    processor = AutoImageProcessor.from_pretrained(exported)
    with torch.no_grad():
        outputs = calibrated_model(processor(Image.open(image_file), return_tensors="pt")["pixel_values"])
    probability, label = outputs.logits.softmax(-1).max(-1)
    file, name, given, exit_layer = answer.strip().split("\t")
    assert (file, name, exit_layer) == (str(image_file), f"LABEL_{label.item()}", f"exit {outputs.exit_layer.item()}")
    assert float(given) == pytest.approx(probability.item(), abs=2e-3)


def test_keeps_to_the_syntax_of_python_3_8():
    source = Path(cascade_mevit.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    # `X | None` and `list[int]` are annotations only, which then are not evaluated
    assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


def test_reads_images_as_the_image_processor_does(exported, image_file):
    processor = AutoImageProcessor.from_pretrained(exported)
    expected = processor(Image.open(image_file), return_tensors="np")["pixel_values"]
    given = Cascade(exported).preprocess([image_file, Image.open(image_file)])
    np.testing.assert_allclose(given, np.concatenate([expected, expected]), atol=1e-5)


def test_settings_are_those_of_the_config(copied, images):
    file = copied / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "exit_thresholds": 10.0}))
    assert Cascade(copied)(images.numpy()).exit_layer.tolist() == [2] * 8
    file.write_text(json.dumps({**settings, "early_exit": False}))
    assert Cascade(copied)(images.numpy()).exit_layer.tolist() == [4] * 8


@pytest.mark.parametrize(
    "id2label", [{0: "LABEL_0", 1: "LABEL_1"}, {index: f"species {index}" for index in range(12)}]
)
def test_labels_are_in_the_order_of_the_logits(copied, id2label):
    MEViTConfig(**{**TINY, "num_labels": len(id2label), "id2label": id2label}).save_pretrained(copied)
    assert Cascade(copied).labels == list(id2label.values())


def test_images_near_a_threshold_are_told_for_each_call(exported, images):
    cascade = Cascade(exported)
    _, scores = cascade.every_exit(images.numpy())
    # one image goes on although it is near the first exit's threshold; another is near the second's, which it reaches
    first, second = np.argsort(scores[:, 0])[[4, 6]]
    thresholds = [float(scores[first, 0]) - 5e-5, float(scores[second, 1]) - 5e-5]
    output = cascade(images.numpy(), early_exit=True, exit_thresholds=thresholds)
    assert output.exit_layer[first] > 2 and output.exit_layer[second] > 2
    assert np.flatnonzero(output.borderline).tolist() == sorted([first, second])
    # an image that left before is not near a threshold that it never met
    output = cascade(images.numpy(), early_exit=True, exit_thresholds=[10.0, thresholds[1]])
    assert not output.borderline.any()
    assert not cascade(images.numpy(), early_exit=False).borderline.any()


def test_later_stages_run_on_the_images_that_go_on(exported, images, monkeypatch):
    _, scores = Cascade(exported).every_exit(images.numpy())
    first = np.sort(scores[:, 0])[2:4].mean()
    second = np.sort(scores[scores[:, 0] >= first, 1])[1:3].mean()
    batches = {}
    run = cascade_mevit.run

    def counted(session, inputs):
        batches.setdefault(id(session), []).append(len(next(iter(inputs.values()))))
        return run(session, inputs)

    monkeypatch.setattr(cascade_mevit, "run", counted)
    cascade = Cascade(exported)
    exit_layer = cascade(images.numpy(), early_exit=True, exit_thresholds=[first, second]).exit_layer
    after = [8, int((exit_layer > 2).sum()), int((exit_layer > 3).sum())]
    assert 8 > after[1] > after[2] > 0  # so that the test can fail
    for place, (stage, query) in enumerate(cascade.stages):
        assert batches[id(stage)] == [after[place]]
        # [CLS] of all that come, the other tokens of those that go on
        assert batches[id(query)] == [after[place], *after[place + 1 : place + 2]]


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (np.zeros((1, 3, 18, 16), np.float32), r"shape \(B, 3, 16, 16\), got \(1, 3, 18, 16\)"),
        (np.zeros((3, 16, 16), np.float32), r"got \(3, 16, 16\)"),
        (np.zeros((1, 3, 16, 16), np.uint8), "pixel_values must be a numpy array of float32, got uint8"),
        ([[1.0]], "got list"),
    ],
)
def test_images_of_another_kind_are_named(exported, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        Cascade(exported)(pixel_values)


@pytest.mark.parametrize("name", ["cascade.json", "config.json", "preprocessor_config.json"])
def test_an_unfinished_export_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"copied is not a finished export of a cascade; it has no {name}"):
        Cascade(copied)


def test_damaged_graphs_are_named(copied):
    (copied / "stage_3.onnx").write_bytes((copied / "stage_3.onnx").read_bytes()[:1000])
    with pytest.raises(ValueError, match="stage_3.onnx is missing or damaged"):
        Cascade(copied)
    (copied / "stage_3.onnx").unlink()
    with pytest.raises(ValueError, match="stage_3.onnx is missing or damaged"):
        Cascade(copied)


@pytest.mark.parametrize(
    "description",
    [
        {"stages": [{"exit_layer": 2, "stage": "stage_2.onnx", "rows": "rows_2.onnx", "cost": 0.5}]},
        {"stages": [], "policy": "margin", "thresholds": [0.5], "early_exit": True},
    ],
)
def test_an_export_of_an_older_version_is_refused(copied, description):
    (copied / "cascade.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="older version; export the checkpoint again with `mevit export`") as raised:
        Cascade(copied)
    assert "\n" not in str(raised.value)


def test_thresholds_are_checked_as_the_model_checks_them(exported):
    cascade, image = Cascade(exported), np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(ValueError, match=r"exit_thresholds must be one number or 2, got \[0.5\]"):
        cascade(image, exit_thresholds=[0.5])
    with pytest.raises(ValueError, match="exit_thresholds must be numbers, got nan"):
        cascade(image, exit_thresholds=float("nan"))
    with pytest.raises(ValueError, match="exit_thresholds need early_exit=True"):
        cascade(image, early_exit=False, exit_thresholds=0.5)
    cascade.config["exit_thresholds"] = None
    with pytest.raises(ValueError, match="neither the call nor the export has any"):
        cascade(image)


def test_providers_by_name_and_with_options(exported):
    image = np.zeros((1, 3, 16, 16), np.float32)
    expected = Cascade(exported)(image).logits
    for providers in ("CPUExecutionProvider", [("CPUExecutionProvider", {})]):
        np.testing.assert_array_equal(Cascade(exported, providers=providers)(image).logits, expected)
    for providers in (["NoProvider"], [("NoProvider", {"option": "1"})]):
        with pytest.raises(ValueError, match="NoProvider is not installed; these are: .*CPUExecutionProvider"):
            Cascade(exported, providers=providers)


@pytest.mark.parametrize("arguments", [["nowhere", "image.png"], ["EXPORTED", "nowhere.png"], ["EXPORTED", __file__]])
def test_the_runtime_file_ends_with_one_line(exported, arguments):
    arguments = [str(exported) if argument == "EXPORTED" else argument for argument in arguments]
    result = subprocess.run(
        [sys.executable, exported / "cascade_mevit.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("cascade_mevit.py: error: ")
