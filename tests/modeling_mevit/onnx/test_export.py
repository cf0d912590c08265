# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exported files against PyTorch, through Optimum, both pipelines and the runtime that knows neither."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor, DeiTImageProcessor, ViTImageProcessor, pipeline

from modeling_mevit.data import image_processor_for
from tests.helpers.models import tiny_model


pytest.importorskip("optimum.exporters.onnx", reason="needs the extra mevit[onnx]")

from optimum.onnxruntime import ORTModelForImageClassification  # noqa: E402
from optimum.pipelines import pipeline as optimum_pipeline  # noqa: E402

from modeling_mevit.onnx import MEViTCascade  # noqa: E402
from modeling_mevit.onnx import export as export_module  # noqa: E402
from modeling_mevit.onnx.cascade_mevit import Cascade  # noqa: E402
from modeling_mevit.onnx.export import ExportError, export  # noqa: E402


PROCESSOR = image_processor_for(16, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], resize_size=20)


def calibrated_model(**settings):
    return tiny_model(**{"exit_thresholds": [0.45, 0.6], "early_exit": True, **settings})


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("export") / "out"
    export(calibrated_model(), PROCESSOR, output, cascade=True)
    return output


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.parametrize(("layer", "file"), [(2, "exit_2.onnx"), (3, "exit_3.onnx"), (4, "model.onnx")])
@pytest.mark.parametrize("batch", [1, 3, 8])
@torch.no_grad()
def test_each_exit_through_optimum(exported, images, layer, file, batch):
    session = ORTModelForImageClassification.from_pretrained(exported, file_name=file)
    place = [2, 3, 4].index(layer)
    expected = calibrated_model()(images[:batch], early_exit=False).exit_logits[:, place]
    torch.testing.assert_close(session(images[:batch]).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("file", ["exit_2.onnx", "model.onnx"])
def test_both_pipelines(exported, photo, file):
    processor = AutoImageProcessor.from_pretrained(exported)
    model = ORTModelForImageClassification.from_pretrained(exported, file_name=file)
    expected = calibrated_model(exit_layers=[2, 3, 4], early_exit=False)
    cut = expected.truncate(2) if file == "exit_2.onnx" else expected
    answer = pipeline("image-classification", model=cut, image_processor=processor)(str(photo))[0]
    for make in (pipeline, lambda *args, **kwargs: optimum_pipeline(*args, accelerator="ort", **kwargs)):
        given = make("image-classification", model=model, image_processor=processor)(str(photo))[0]
        assert given["label"] == answer["label"] and given["score"] == pytest.approx(answer["score"], abs=1e-4)


@pytest.mark.parametrize("batch", [0, 1, 3, 8])
@torch.no_grad()
def test_the_cascade_is_the_model(exported, images, batch):
    model, cascade = calibrated_model(), MEViTCascade.from_pretrained(exported)
    for settings in ({}, {"early_exit": True, "exit_thresholds": 0.5}):
        expected, given = (one(images[:batch], **settings) for one in (model, cascade))
        assert given.exit_layer.tolist() == expected.exit_layer.tolist()
        torch.testing.assert_close(given.logits, expected.logits, atol=1e-4, rtol=0)
    if batch == 8:
        assert len(expected.exit_layer.unique()) > 1
        every = model(images, early_exit=False)
        logits, scores = cascade.cascade.every_exit(images.numpy())
        np.testing.assert_allclose(logits, every.exit_logits.numpy(), atol=1e-4)
        np.testing.assert_allclose(scores, every.exit_scores.numpy(), atol=1e-4)
    given = cascade(images[:batch].half(), early_exit=False)
    assert given.exit_layer is None and given.exit_logits.shape == (batch, 3, 5)
    if not batch:  # which a ViT cannot run to its end
        return
    expected = model(images[:batch].half(), early_exit=False)
    for name in ("logits", "exit_logits", "exit_scores"):
        torch.testing.assert_close(given[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"exit_policy": "patience", "exit_thresholds": None},
        {"exit_policy": "entropy", "exit_thresholds": [1.2], "exit_layers": [1, 4]},
        {"uncertainty_input": "probabilities", "share_uncertainty_predictor": False},
        {"uncertainty_input": "hidden_state", "attn_implementation": "eager"},
    ],
)
@torch.no_grad()
def test_policies_and_predictors(tmp_path, images, settings):
    model = calibrated_model(**settings)
    if model.config.exit_thresholds is not None:
        scores = model(images, early_exit=False).exit_scores[:, :-1].sort(dim=0).values
        model.config.exit_thresholds = ((scores[3] + scores[4]) / 2).tolist()
    export(model, PROCESSOR, tmp_path / "out", exits=[4], cascade=True)
    expected, given = model(images), MEViTCascade.from_pretrained(tmp_path / "out")(images)
    assert given.exit_layer.tolist() == expected.exit_layer.tolist()
    assert len(expected.exit_layer.unique()) > 1
    torch.testing.assert_close(given.logits, expected.logits, atol=1e-4, rtol=0)


def test_each_weight_lies_in_one_graph(tmp_path):
    model = calibrated_model(hidden_size=128, intermediate_size=512)
    files = export(model, PROCESSOR, tmp_path / "out", exits=[4], cascade=True).files
    stages = sum(size for name, size in files.items() if name.startswith(("stage", "rows")))
    extra = sum(p.numel() for name in ("2", "3") for p in model.exits[name].parameters()) * 4
    assert stages <= 1.02 * files["model.onnx"] + extra + 30_000  # graphs without weights take a few kB each


def test_runs_where_neither_torch_nor_transformers_can_be_imported(exported, photo, tmp_path):
    program = tmp_path / "without.py"
    lines = [
        "import runpy, sys",
        "for name in ('torch', 'transformers', 'optimum', 'modeling_mevit'):",
        "    sys.modules[name] = None",
        f"sys.argv = ['cascade_mevit.py', {str(exported)!r}, {str(photo)!r}]",
        f"runpy.run_path({str(exported / 'cascade_mevit.py')!r}, run_name='__main__')",
    ]
    program.write_text("\n".join(lines))
    answer = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout
    model = calibrated_model()
    pixel_values = AutoImageProcessor.from_pretrained(exported)(Image.open(photo), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values)
    probability, label = outputs.logits.softmax(-1).max(-1)
    file, name, given, exit_layer = answer.strip().split("\t")
    assert (file, name, exit_layer) == (str(photo), f"LABEL_{label.item()}", f"exit {outputs.exit_layer.item()}")
    assert float(given) == pytest.approx(probability.item(), abs=2e-3)


def test_reads_images_as_the_image_processor_does(exported, photo):
    expected = AutoImageProcessor.from_pretrained(exported)(Image.open(photo), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(Cascade(exported).preprocess([photo, Image.open(photo)])[1:], expected, atol=1e-5)


# Faults


def test_a_file_that_differs_fails_the_export(tmp_path, monkeypatch):
    write = export_module.export_models

    def another_model(pairs, directory, **settings):
        graph, config = pairs["model.onnx"]
        with torch.no_grad():
            graph.model.exits["4"].classifier.bias.add_(1.0)
        outputs = write(pairs, directory, **settings)
        with torch.no_grad():
            graph.model.exits["4"].classifier.bias.sub_(1.0)
        return outputs

    monkeypatch.setattr(export_module, "export_models", another_model)
    with pytest.raises(ExportError, match=r"model.onnx differs from PyTorch: .*logits.*max diff.* 1\.0.*out.failed"):
        export(calibrated_model(), PROCESSOR, tmp_path / "out", exits=[4])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert (tmp_path / "out.failed" / "model.onnx").is_file()


def test_an_interrupted_export_leaves_nothing_that_loads(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "compare_cascade", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(calibrated_model(), PROCESSOR, tmp_path / "out", exits=[4], cascade=True)
    assert not list(tmp_path.iterdir())
    # a process that is killed cannot tidy up
    monkeypatch.setattr(export_module.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        export(calibrated_model(), PROCESSOR, tmp_path / "out", exits=[4], cascade=True)
    assert (tmp_path / "out.partial" / "model.onnx").is_file() and not (tmp_path / "out").exists()
    for load in (ORTModelForImageClassification.from_pretrained, MEViTCascade.from_pretrained):
        with pytest.raises((OSError, ValueError)):
            load(tmp_path / "out.partial")
    monkeypatch.undo()
    export(calibrated_model(), PROCESSOR, tmp_path / "out", exits=[4])
    assert not (tmp_path / "out.partial").exists() and (tmp_path / "out" / "model.onnx").is_file()


def test_a_cascade_that_leaves_elsewhere_fails_the_export(tmp_path, monkeypatch):
    call = Cascade.__call__

    def one_late(self, *args, **kwargs):
        logits, exit_layer = call(self, *args, **kwargs)
        exit_layer[exit_layer.argmin()] = 4
        return logits, exit_layer

    monkeypatch.setattr(Cascade, "__call__", one_late)
    with pytest.raises(ExportError, match="1 of 8 images leave the cascade at another exit"):
        export(calibrated_model(), PROCESSOR, tmp_path / "out", cascade=True)


def test_a_runtime_that_reads_images_otherwise_fails_the_export(tmp_path, monkeypatch):
    read = Cascade.preprocess
    monkeypatch.setattr(Cascade, "preprocess", lambda self, images: read(self, images) + 0.02)
    with pytest.raises(ExportError, match="differ by 1.0 grey levels on average"):
        export(calibrated_model(), PROCESSOR, tmp_path / "out", cascade=True)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 16, "width": 16}),  # what most ViT checkpoints have
        DeiTImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False, do_rescale=False),
        DeiTImageProcessor(
            size={"height": 20, "width": 18}, crop_size={"height": 16, "width": 16}, do_normalize=False
        ),
    ],
)
def test_other_image_processors(tmp_path, photo, processor):
    export(calibrated_model(), processor, tmp_path / "out", exits=[4], cascade=True)
    expected = processor(Image.open(photo), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(Cascade(tmp_path / "out").preprocess([photo]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (BitImageProcessor(size={"shortest_edge": 16}), r"size={'shortest_edge': 16} cannot be exported"),
        (
            ViTImageProcessor(size={"height": 20, "width": 20}),
            r"makes images of \[20, 20\]; the model needs \[16, 16\]",
        ),
    ],
)
def test_image_processors_that_the_runtime_cannot_follow(tmp_path, processor, message):
    with pytest.raises(ValueError, match=message):
        export(calibrated_model(), processor, tmp_path / "out", cascade=True)
    assert not list(tmp_path.iterdir())


def test_images_near_a_threshold_are_counted(exported, images):
    cascade = Cascade(exported)
    _, scores = cascade.every_exit(images.numpy())
    # the first two are near the first exit's threshold and go on, or not; the third is near the second's
    thresholds = [float(scores[:2, 0].max()) + 5e-5, float(scores[2, 1]) - 5e-5]
    near = (np.abs(scores[:, :2] - thresholds) < 1e-4) & np.stack(
        (np.ones(8, dtype=bool), scores[:, 0] >= thresholds[0]), axis=1
    )
    cascade(images.numpy(), early_exit=True, exit_thresholds=thresholds)
    assert cascade.borderline == near.any(1).sum() >= 1
    cascade(images.numpy(), early_exit=True, exit_thresholds=-1.0)
    assert cascade.borderline == near.any(1).sum()


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"exits": [1, 4]}, r"exits=\[1, 4\] are not all exits of this model; it has \[2, 3, 4\]"),
        ({}, {"opset": 11}, "opset=11 cannot be exported; allowed are 17 to 23"),
        ({"exit_thresholds": None, "early_exit": False}, {"cascade": True}, "early exit needs exit_thresholds"),
        ({"exit_layers": [4], "exit_thresholds": None, "early_exit": False}, {"cascade": True}, "has one exit only"),
    ],
)
def test_what_the_model_has_not_is_named(tmp_path, settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(calibrated_model(**settings), PROCESSOR, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is not empty"):
        export(calibrated_model(), PROCESSOR, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (np.zeros((1, 3, 18, 16), np.float32), r"shape \(1, 3, 18, 16\); allowed is \(B, 3, 16, 16\)"),
        (np.zeros((3, 16, 16), np.float32), r"shape \(3, 16, 16\)"),
        (np.zeros((1, 3, 16, 16), np.uint8), "pixel_values are uint8; allowed is a numpy array of float32"),
        ([[1.0]], "pixel_values are list"),
    ],
)
def test_images_of_another_kind_are_named(exported, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        Cascade(exported)(pixel_values)


def test_damaged_files_and_missing_providers_are_named(exported, tmp_path):
    with pytest.raises(ValueError, match="NoProvider is not installed; these are: .*CPUExecutionProvider"):
        Cascade(exported, providers=["NoProvider"])
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "stage_3.onnx").write_bytes((broken / "stage_3.onnx").read_bytes()[:1000])
    with pytest.raises(ValueError, match="stage_3.onnx is missing or damaged"):
        Cascade(broken)
    (broken / "stage_3.onnx").unlink()
    with pytest.raises(ValueError, match="stage_3.onnx is missing or damaged"):
        Cascade(broken)
    (broken / "cascade.json").unlink()
    with pytest.raises(ValueError, match="it has no cascade.json"):
        Cascade(broken)
    description = json.loads((exported / "cascade.json").read_text())
    assert [stage["exit_layer"] for stage in description["stages"]] == [2, 3, 4]
    assert description["stages"][0]["inputs_of_stage"] == ["pixel_values"]
    assert description["stages"][1]["inputs_of_rows"] == ["hidden_rows", "normed_rows", "keys", "values"]
    assert description["stages"][2]["outputs_of_rows"] == ["rows", "logits", "score"]


def test_thresholds_are_checked_as_the_model_checks_them(exported):
    cascade, image = Cascade(exported), np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(ValueError, match="1 exit_thresholds do not fit 2 early exits"):
        cascade(image, exit_thresholds=[0.5])
    with pytest.raises(ValueError, match="hold NaN"):
        cascade(image, exit_thresholds=float("nan"))
    with pytest.raises(ValueError, match="exit_thresholds are for early_exit=True"):
        cascade(image, early_exit=False, exit_thresholds=0.5)


def test_providers_by_name_and_with_options(exported):
    image = np.zeros((1, 3, 16, 16), np.float32)
    expected, _ = Cascade(exported)(image)
    for providers in ("CPUExecutionProvider", [("CPUExecutionProvider", {})]):
        np.testing.assert_array_equal(Cascade(exported, providers=providers)(image)[0], expected)
    with pytest.raises(ValueError, match="provider NoProvider is not installed"):
        Cascade(exported, providers=[("NoProvider", {"option": "1"})])


@pytest.mark.parametrize(
    "arguments", [["nowhere", "image.png"], ["EXPORTED", "nowhere.png"], ["EXPORTED", __file__]]
)
def test_the_runtime_file_ends_with_one_line(exported, arguments):
    arguments = [str(exported) if argument == "EXPORTED" else argument for argument in arguments]
    result = subprocess.run(
        [sys.executable, exported / "cascade_mevit.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("cascade_mevit.py: error: ")
