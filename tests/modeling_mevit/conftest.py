# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `mevit`, what it is given, and an export that many tests read."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessor

from modeling_mevit import MEViTConfig, MEViTForImageClassification, cli
from modeling_mevit.data.image_processing import image_processor_for
from tests.helpers.images import EVALUATION_SIZES, TWO_COLOURS, write_colours
from tests.helpers.models import TINY, tiny_model


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return write_colours(
        tmp_path_factory.mktemp("photos"), TWO_COLOURS, EVALUATION_SIZES, deviation=60, shape=(16, 16)
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos) -> Path:
    """A checkpoint that tells the colours apart at every exit, by the mean of red that its embedding carries."""
    torch.manual_seed(0)
    settings = {**TINY, "num_labels": 2, "id2label": {0: "teal", 1: "crimson"}, "label2id": {"teal": 0, "crimson": 1}}
    model = MEViTForImageClassification(MEViTConfig(**settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    processor = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3, resize_size=16)
    images = [(Image.open(file), file.parent.name) for file in sorted(photos.glob("validation/*/*.png"))]
    pixel_values = processor([image for image, _ in images], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([model.config.label2id[name] for _, name in images])
    for _ in range(30):
        optimizer.zero_grad()
        model(pixel_values, labels).loss.backward()
        optimizer.step()
    directory = tmp_path_factory.mktemp("trained")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def processor() -> DeiTImageProcessor:
    return image_processor_for(16, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], resize_size=20)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, processor) -> Path:
    """An export of the calibrated model, with its cascade; not to be changed."""
    from modeling_mevit.onnx.export import export

    output = tmp_path_factory.mktemp("export") / "out"
    model = tiny_model(exit_thresholds=[0.45, 0.6], early_exit=True)
    export(model, processor, output, exits=[2, 3, 4], cascade=True)
    return output


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "checkpoint")


@pytest.fixture
def mevit(monkeypatch, capsys):
    """Runs the console script with arguments. Returns its exit code, or its last message, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mevit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, capsys.readouterr().out

    return run
