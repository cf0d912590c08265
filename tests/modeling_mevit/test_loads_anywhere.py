# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint loads with and without the package, and across major versions of Transformers in both directions."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from modeling_mevit.data.image_processing import evaluation_transform, image_processor_for
from tests.helpers.models import tiny_model


SCRIPT = Path(__file__).parents[1] / "helpers" / "checkpoint_process.py"
# the Python of an environment with the other major version of Transformers; `make test-transformers4` sets it
OTHER_PYTHON = os.environ.get("MEVIT_OTHER_PYTHON")


def run(python: str, *arguments: str | Path) -> None:
    directory = Path(arguments[1])
    # code that comes with a checkpoint is copied here, not into the user's cache
    environment = {**os.environ, "HF_MODULES_CACHE": str(directory / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [python, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=directory
    )
    assert result.returncode == 0 and result.stdout.endswith("passed\n"), result.stdout + result.stderr


def keys(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--without-package"]], ids=["with package", "without package"])
def test_loads_in_a_process_of_its_own(tmp_path, options):
    run(sys.executable, "write", tmp_path)
    run(sys.executable, "read", tmp_path, *options)


@pytest.mark.skipif(not OTHER_PYTHON, reason="MEVIT_OTHER_PYTHON names no Python with another major of Transformers")
@pytest.mark.parametrize("options", [[], ["--without-package"]], ids=["with package", "without package"])
@pytest.mark.parametrize("direction", ["written here", "written there"])
def test_loads_across_major_versions(tmp_path, direction, options):
    writer, reader = (sys.executable, OTHER_PYTHON)[:: 1 if direction == "written here" else -1]
    run(writer, "write", tmp_path)
    run(reader, "read", tmp_path, *options)


@pytest.mark.skipif(not OTHER_PYTHON, reason="MEVIT_OTHER_PYTHON names no Python with another major of Transformers")
def test_both_majors_write_the_same_keys(tmp_path):
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__.split('.')[0])"]
    majors = {subprocess.check_output([python, *version[1:]], text=True) for python in (sys.executable, OTHER_PYTHON)}
    assert len(majors) == 2
    for python, name in ((sys.executable, "here"), (OTHER_PYTHON, "there")):
        (tmp_path / name).mkdir()
        run(python, "write", tmp_path / name)
    assert keys(tmp_path / "here") == keys(tmp_path / "there")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in keys(tmp_path / "here")


def test_weights_are_safetensors_beside_their_code(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "configuration_mevit.py",
        "encoder_layer_mevit.py",
        "exit_policy_mevit.py",
        "loss_mevit.py",
        "model.safetensors",
        "modeling_mevit.py",
        "vit_backbone_mevit.py",
    ]


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_pipeline_runs_it(tmp_path):
    model = tiny_model(id2label={0: "A318", 1: "A319", 2: "A320", 3: "A321", 4: "A330"})
    processor = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, format="PNG")
    (tmp_path / "image.png").write_bytes(file.getvalue())

    on_pillow = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    classify = pipeline("image-classification", str(tmp_path), image_processor=on_pillow)
    answers = classify(str(tmp_path / "image.png"), top_k=5)
    with torch.no_grad():
        probabilities = model(evaluation_transform(processor)(image)[None]).logits.softmax(-1)[0]
    assert {answer["label"]: pytest.approx(answer["score"], abs=1e-5) for answer in answers} == {
        model.config.id2label[label]: value.item() for label, value in enumerate(probabilities)
    }
