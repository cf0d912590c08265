# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimum, where it runs: it writes the files of exits, and reads them, whatever wrote them."""

import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from transformers import AutoImageProcessor, pipeline


pytest.importorskip("optimum.onnxruntime", reason="Optimum needs Transformers 4.57", exc_type=ImportError)

from optimum.onnxruntime import ORTModelForImageClassification, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from optimum.pipelines import pipeline as optimum_pipeline

from modeling_mevit import MEViTForImageClassification, export
from modeling_mevit.onnx import quantize
from tests.helpers.float16_graphs import assert_heads_alone_are_in_float32
from tests.helpers.models import tiny_model


FILES = [(2, "exit_2.onnx"), (3, "exit_3.onnx"), (4, "model.onnx")]
PROCESS = Path(__file__).parents[2] / "helpers" / "export_process.py"
# the Python of an environment with the other major version of Transformers; `make test-transformers4` sets it
OTHER_PYTHON = os.environ.get("MEVIT_OTHER_PYTHON")


@pytest.fixture(scope="module")
def by_optimum(tmp_path_factory, processor) -> Path:
    model = tiny_model(exit_thresholds=[0.45, 0.6], early_exit=True)
    return export(model, processor, tmp_path_factory.mktemp("optimum") / "out", exporter="optimum").directory


@pytest.fixture(scope="module", params=["torch", "optimum"])
def directory(request) -> Path:
    """The exits' files, by both exporters."""
    return request.getfixturevalue({"torch": "exported", "optimum": "by_optimum"}[request.param])


@pytest.mark.parametrize(("layer", "file"), FILES)
@pytest.mark.parametrize("batch", [1, 3, 8])
@torch.no_grad()
def test_each_exit_through_optimum(directory, calibrated_model, images, layer, file, batch):
    session = ORTModelForImageClassification.from_pretrained(directory, file_name=file)
    place = [2, 3, 4].index(layer)
    expected = calibrated_model(images[:batch], early_exit=False).exit_logits[:, place]
    torch.testing.assert_close(session(images[:batch]).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("file", ["exit_2.onnx", "model.onnx"])
def test_both_pipelines(directory, calibrated_model, image_file, file):
    calibrated_model.config.early_exit = False
    cut = calibrated_model.truncate(2) if file == "exit_2.onnx" else calibrated_model
    assert_both_pipelines_give(cut, directory, file, image_file)


def test_the_quantizer_of_optimum_reads_the_files(directory, calibrated_model, images, tmp_path):
    quantizer = ORTQuantizer.from_pretrained(directory, file_name="exit_2.onnx")
    quantizer.quantize(AutoQuantizationConfig.avx2(is_static=False, per_channel=False), save_dir=tmp_path)
    session = ORTModelForImageClassification.from_pretrained(tmp_path, file_name="exit_2_quantized.onnx")
    with torch.no_grad():
        expected = calibrated_model.truncate(2)(images).logits
    assert 0 < (session(images).logits - expected).abs().max() < 1.5


@pytest.mark.parametrize(("layer", "file"), FILES)
def test_both_exporters_write_the_same(exported, by_optimum, images, layer, file):
    ours, theirs = (
        ORTModelForImageClassification.from_pretrained(folder, file_name=file).model
        for folder in (exported, by_optimum)
    )
    for names in ("get_inputs", "get_outputs"):
        given, expected = (
            [(one.name, one.shape, one.type) for one in getattr(model, names)()] for model in (ours, theirs)
        )
        assert given == expected
    for batch in (1, 3, 8):
        inputs = {"pixel_values": images[:batch].numpy()}
        for given, expected in zip(ours.run(None, inputs), theirs.run(None, inputs), strict=True):
            np.testing.assert_allclose(given, expected, atol=1e-5)


def test_heads_are_told_in_files_of_both_exporters(directory):
    graph = onnx.load(directory / "exit_2.onnx").graph
    given_to = {node.name: " ".join(node.input) for node in graph.node if node.op_type in quantize.QUANTIZED}
    in_float = quantize._nodes_in_float(onnx.load(directory / "exit_2.onnx"))
    heads = [name for name, given in given_to.items() if "classifier.weight" in given]
    assert len(heads) == 1 and heads[0] in in_float
    assert len(given_to) - len(in_float) == 2 * 6  # what attention and MLP multiply with, of two layers


def test_heads_stay_in_float32_in_float16_files_of_both_exporters(directory, tmp_path):
    quantize._to_float16(directory / "exit_2.onnx", tmp_path / "half.onnx")
    half = onnx.load(tmp_path / "half.onnx")
    assert_heads_alone_are_in_float32(half)
    assert [node.op_type for node in half.graph.node].count("LayerNormalization") == 2 * 2 + 1


def test_the_command_writes_them(mevit, checkpoint, tmp_path):
    code, out = mevit("export", checkpoint, tmp_path / "out", "--exits", "2", "--exporter", "optimum")
    assert code == 0 and "exit_2.onnx" in out
    assert (tmp_path / "out" / "exit_2.onnx").is_file()


@pytest.mark.skipif(not OTHER_PYTHON, reason="MEVIT_OTHER_PYTHON names no Python with another major of Transformers")
def test_files_of_the_other_major_are_read(tmp_path, image_file):
    done = subprocess.run([OTHER_PYTHON, PROCESS, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    majors = [version.split(".")[0] for version in (done.stdout.split()[-1], transformers.__version__)]
    assert majors == ["5", "4"]
    expected = np.load(tmp_path / "out" / "expected.npz")
    for layer, file in ((2, "exit_2.onnx"), (4, "model.onnx")):
        session = ORTModelForImageClassification.from_pretrained(tmp_path / "out", file_name=file)
        logits = session(torch.from_numpy(expected["pixel_values"])).logits
        np.testing.assert_allclose(logits, expected[f"exit_{layer}"], atol=1e-4)
    cut = MEViTForImageClassification.from_pretrained(tmp_path / "out" / "cut")
    assert_both_pipelines_give(cut, tmp_path / "out", "exit_2.onnx", image_file)


def assert_both_pipelines_give(model, directory: Path, file: str, image_file: Path) -> None:
    """Asserts that Transformers' and Optimum's pipelines say of a file what Transformers' says of a model."""
    processor = AutoImageProcessor.from_pretrained(directory)
    session = ORTModelForImageClassification.from_pretrained(directory, file_name=file)
    expected = pipeline("image-classification", model=model, image_processor=processor)(str(image_file))[0]
    for make in (pipeline, lambda *args, **kwargs: optimum_pipeline(*args, accelerator="ort", **kwargs)):
        given = make("image-classification", model=session, image_processor=processor)(str(image_file))[0]
        assert given["label"] == expected["label"]
        assert given["score"] == pytest.approx(expected["score"], abs=1e-4)
