# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Graphs that are written once, and what goes into them. Skipped without the extra `mevit[onnx]`."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mevit import MEViTForImageClassification
from tests.helpers.exports import write_once
from tests.helpers.models import tiny_model


if not (find_spec("onnxruntime") and find_spec("onnxscript")):
    collect_ignore_glob = ["test_*.py", "*/test_*.py"]


def pytest_collection_modifyitems(items):
    """Exporting takes seconds: all tests of this folder are slow."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def graphs_written_once(tmp_path_factory):
    """Writing a graph takes seconds: one that was written before, of equal weights, is copied. All are compared."""
    from modeling_mevit.onnx import export as export_module

    folder = tmp_path_factory.mktemp("graphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "write_graph", partial(write_once, folder, export_module.write_graph))
        yield


@pytest.fixture
def calibrated_model() -> MEViTForImageClassification:
    return tiny_model(exit_thresholds=[0.45, 0.6], early_exit=True)


@pytest.fixture
def calibrated(mevit, checkpoint, photos) -> Path:
    """A checkpoint that leaves early, by its thresholds."""
    code, _ = mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.8", "--policy", "confidence")
    assert code == 0
    return checkpoint


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def image_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file
