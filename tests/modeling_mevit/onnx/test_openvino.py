# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exports that OpenVINO runs, in float32 and in bfloat16."""

import json
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_mevit import CalibrationTarget, MEViTCascade, calibrate, export
from modeling_mevit._extras import MissingExtraError
from modeling_mevit.onnx import cascade_mevit
from modeling_mevit.onnx.cascade_mevit import Cascade, OpenVINOGraph, openvino_core
from modeling_mevit.onnx.export import compare_cascade
from modeling_mevit.onnx.quantize import Quantization
from tests.helpers.models import tiny_model
from tests.helpers.openvino_here import hide, needs_bfloat16


pytest.importorskip("openvino", reason="needs the extra mevit[openvino]")

TARGET = CalibrationTarget(max_disagreement=0.2, confidence=0.9)


@pytest.fixture(scope="module")
def dataset() -> list[dict]:
    model = tiny_model(exit_policy="margin")
    pixel_values = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        labels = model(pixel_values, early_exit=False).logits.argmax(-1).tolist()
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels, strict=True)]


@pytest.fixture(scope="module")
def certified(tmp_path_factory, processor, dataset) -> Path:
    """A certified export in float32; not to be changed."""
    model = tiny_model(exit_policy="margin")
    with torch.no_grad():  # so that early exits agree with the last one
        for layer in ("2", "3"):
            model.exits[layer].classifier.weight.zero_()
            model.exits[layer].classifier.bias.copy_(torch.tensor([5.0, 0, 0, 0, 0]))
        model.exits["4"].classifier.bias[0] += 20
    calibrate(model, dataset, TARGET).apply_to(model.config)
    assert model.certificate
    output = tmp_path_factory.mktemp("certified") / "out"
    export(model, processor, output, exits=[4], cascade=True)
    return output


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory, processor, dataset) -> Path:
    """An export that was calibrated in bfloat16; not to be changed."""
    model = tiny_model(exit_policy="margin")
    calibrate(model, dataset, CalibrationTarget(max_accuracy_drop=0.1)).apply_to(model.config)
    output = tmp_path_factory.mktemp("bfloat16") / "out"
    export(model, processor, output, exits=[4], cascade=True, quantization=Quantization("bfloat16", dataset))
    return output


@pytest.mark.parametrize("batch", [0, 1, 3, 8])
@torch.no_grad()
def test_in_float32_it_is_the_model(exported, calibrated_model, images, batch):
    cascade = Cascade(exported, backend="openvino", precision="float32", threads=1)
    assert cascade.precision == "float32"
    given, expected = cascade(images[:batch].numpy()), calibrated_model(images[:batch])
    assert given.exit_layer.tolist() == expected.exit_layer.tolist()
    np.testing.assert_allclose(given.logits, expected.logits.numpy(), atol=1e-4)
    if batch == 8:
        assert len(expected.exit_layer.unique()) > 1  # so that compaction is seen
        compare_cascade(calibrated_model, cascade)


@pytest.mark.parametrize("settings", [{"exit_policy": "entropy"}, {"exit_policy": "patience", "exit_thresholds": 0.5}])
def test_combined_exits_and_every_score(tmp_path, processor, images, settings):
    model = tiny_model(exit_combination="mean", **settings)
    output = tmp_path / "out"
    export(model, processor, output, cascade=True, early_exit=False)
    compare_cascade(model, Cascade(output, backend="openvino", precision="float32"))


@needs_bfloat16
@torch.no_grad()
def test_in_bfloat16_it_is_near_the_model(exported, calibrated_model, images):
    cascade = Cascade(exported, backend="openvino")
    assert cascade.precision == "bfloat16"  # which OpenVINO takes by itself
    expected = calibrated_model(images, early_exit=False)
    logits, scores = cascade.every_exit(images.numpy())
    assert 1e-4 < np.abs(logits - expected.exit_logits.numpy()).max() < 0.2
    np.testing.assert_allclose(scores, expected.exit_scores.numpy(), atol=0.05)
    thresholds = [float(np.sort(scores[:, place])[3:5].mean()) for place in (0, 1)]
    taken = cascade(images.numpy(), exit_thresholds=thresholds)
    leaves = np.concatenate((scores[:, :2] < thresholds, np.ones((8, 1), dtype=bool)), axis=1)
    assert taken.exit_layer.tolist() == np.array([2, 3, 4])[leaves.argmax(1)].tolist()
    alone = [cascade(image[None], exit_thresholds=thresholds) for image in images.numpy()]
    assert np.concatenate([one.exit_layer for one in alone]).tolist() == taken.exit_layer.tolist()


@needs_bfloat16
def test_scores_in_bfloat16_are_fine(in_bfloat16):
    """What comes after the last matrix product stays in float32."""
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(3)).numpy()
    _, scores = Cascade(in_bfloat16).every_exit(images)
    assert all(len(np.unique(column)) > 60 for column in scores.T)


def test_threads_do_not_share_the_memory_of_a_run(exported, images):
    cascade = Cascade(exported, backend="openvino", precision="float32", threads=1)
    expected = [cascade(image[None]) for image in images.numpy()]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(cascade, [image[None] for image in images.numpy()] * 8))
    for place, output in enumerate(given):
        np.testing.assert_array_equal(output.logits, expected[place % 8].logits)


@pytest.mark.parametrize(("backend", "hidden"), [("openvino", "onnxruntime"), ("onnxruntime", "openvino")])
def test_one_runtime_is_enough(exported, images, tmp_path, backend, hidden):
    np.save(tmp_path / "images.npy", images.numpy())
    program = tmp_path / "alone.py"
    lines = [
        "import sys",
        f"for name in ('torch', 'transformers', 'modeling_mevit', {hidden!r}):",
        "    sys.modules[name] = None",
        f"sys.path.insert(0, {str(exported)!r})",
        "import numpy as np",
        "from cascade_mevit import Cascade",
        f"assert {backend!r} not in sys.modules",
        f"cascade = Cascade({str(exported)!r}, backend={backend!r})",
        f"print(cascade(np.load({str(tmp_path / 'images.npy')!r})).exit_layer.shape)",
        f"try: Cascade({str(exported)!r}, backend={hidden!r})",
        "except ImportError as error: print(error.name)",
    ]
    program.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["(8,)", hidden], done.stderr


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_extra_that_is_missing_is_named(exported, monkeypatch, backend):
    hide(backend, monkeypatch)
    extra = {"openvino": "openvino", "onnxruntime": "onnx"}[backend]
    told = rf"an export needs {backend}, which is not installed: pip install 'mevit\[{extra}\]'"
    with pytest.raises(MissingExtraError, match=told):
        MEViTCascade.from_pretrained(exported, backend=backend)


# What is promised in which precision


@needs_bfloat16
def test_another_precision_than_that_of_the_calibration_is_told(certified, in_bfloat16, images):
    with warnings.catch_warnings(action="error", category=UserWarning):
        cascade = MEViTCascade.from_pretrained(certified)
        assert cascade.certificate == TARGET.to_dict()
        same = MEViTCascade.from_pretrained(certified, backend="openvino", precision="float32")
        assert same.certificate == cascade.certificate
        assert MEViTCascade.from_pretrained(in_bfloat16).cascade.backend == "openvino"
    with pytest.warns(UserWarning, match="were chosen in float32, got bfloat16, where scores differ"):
        other = MEViTCascade.from_pretrained(certified, backend="openvino")
    with pytest.warns(UserWarning, match="certificate of early exit is gone: the precision is bfloat16, not float32"):
        assert other.certificate is None
    assert other(images).exit_layer is not None
    with pytest.warns(UserWarning, match="were chosen in bfloat16, got float32"):
        assert Cascade(in_bfloat16, backend="onnxruntime").precision == "float32"
    with pytest.warns(UserWarning, match="were chosen in bfloat16, got float32"):
        Cascade(in_bfloat16, precision="float32")


def test_older_calibrations_are_of_the_precision_of_the_export(certified, tmp_path):
    copied = shutil.copytree(certified, tmp_path / "older")
    config = json.loads((copied / "config.json").read_text())
    del config["calibration"]["made_for"]["dtype"]
    (copied / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert MEViTCascade.from_pretrained(copied).certificate == TARGET.to_dict()
    config["exit_thresholds"] = [0.1, 0.1]  # set by hand, for whatever precision
    (copied / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert Cascade(copied, backend="openvino").exit_layers == [2, 3, 4]


def test_nothing_is_promised_where_answers_depend_on_the_batch(certified, tmp_path):
    copied = shutil.copytree(certified, tmp_path / "dynamic")
    description = json.loads((copied / "cascade.json").read_text())
    (copied / "cascade.json").write_text(json.dumps({**description, "precision": "int8-dynamic", "target": "avx2"}))
    config = json.loads((copied / "config.json").read_text())
    config["calibration"]["made_for"]["dtype"] = "int8-dynamic"
    (copied / "config.json").write_text(json.dumps(config))
    cascade = MEViTCascade.from_pretrained(copied)
    with pytest.warns(UserWarning, match="gone: with int8-dynamic an answer depends on the images beside it"):
        assert cascade.certificate is None


@needs_bfloat16
def test_an_export_for_bfloat16_is_of_float32_files(in_bfloat16, dataset):
    described = json.loads((in_bfloat16 / "cascade.json").read_text())
    assert (described["precision"], described["target"]) == ("bfloat16", None)
    accuracy = json.loads((in_bfloat16 / "precision.json").read_text())["accuracy"]["model.onnx"]
    assert accuracy["float32"] == 1.0 and accuracy["bfloat16"] > 0.9
    cascade = MEViTCascade.from_pretrained(in_bfloat16)
    assert cascade.config.calibration["made_for"]["dtype"] == cascade.precision == "bfloat16"
    last = cascade.to_vit()
    pixel_values = torch.stack([image["pixel_values"] for image in dataset])
    agree = last(pixel_values).logits.argmax(-1) == torch.tensor([image["labels"] for image in dataset])
    assert agree.float().mean().item() == pytest.approx(accuracy["bfloat16"], abs=0.05)


@needs_bfloat16
def test_files_in_int8_are_of_another_precision_here(in_bfloat16, tmp_path):
    copied = shutil.copytree(in_bfloat16, tmp_path / "int8")
    description = json.loads((copied / "cascade.json").read_text())
    (copied / "cascade.json").write_text(json.dumps({**description, "precision": "int8", "target": "avx2"}))
    with pytest.warns(UserWarning, match="got int8 by OpenVINO in float32"):
        Cascade(copied, backend="openvino", precision="float32")


def test_a_processor_without_bfloat16_is_told(monkeypatch):
    class Core:
        def get_property(self, *names):
            return ["FP32", "INT8"]

    monkeypatch.setattr(cascade_mevit, "openvino_core", Core)
    with pytest.raises(ValueError, match="needs a processor that computes in it .* got one of float32"):
        Quantization("bfloat16", calibration=[])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "backend must be one of 'onnxruntime', 'openvino', got 'tensorrt'"),
        (
            {"backend": "openvino", "precision": "f32"},
            "precision must be one of 'float32', 'bfloat16', 'float16', got",
        ),
        ({"backend": "openvino", "providers": "CPUExecutionProvider"}, "must be left out with OpenVINO"),
        ({"precision": "float32"}, "precision is chosen for OpenVINO; ONNX Runtime computes in that of the graphs"),
        ({"backend": "onnxruntime", "precision": "float32"}, "precision is chosen for OpenVINO"),
    ],
)
def test_bad_arguments_are_named(exported, arguments, message):
    with pytest.raises(ValueError, match=message):
        Cascade(exported, **arguments)


def test_a_precision_that_the_processor_lacks_is_named(exported):
    able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
    having = ", ".join(repr(name) for name, theirs in names.items() if theirs in able)
    for precision in (name for name, theirs in names.items() if theirs not in able):
        with pytest.raises(ValueError, match=f"precision must be one of {having}, which .* got '{precision}'"):
            OpenVINOGraph(exported / "model.onnx", precision)


def test_a_signal_after_cascades_are_gone_is_handled(exported):
    """As Ctrl-C is, and the end of a DataLoader's worker."""
    program = f"""
import gc, os, signal
from modeling_mevit.onnx.cascade_mevit import Cascade

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
cascades = [Cascade({str(exported)!r}, backend="openvino") for _ in range(2)]
cascades.clear()
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "handled\n"), result.stderr


def test_damaged_graphs_are_named(exported, tmp_path):
    copied = shutil.copytree(exported, tmp_path / "copied")
    (copied / "stage_3.onnx").write_bytes((copied / "stage_3.onnx").read_bytes()[:1000])
    with pytest.raises(ValueError, match="stage_3.onnx is damaged"):
        Cascade(copied, backend="openvino")
