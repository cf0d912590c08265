# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exported files against PyTorch, and exports that must not succeed."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, DeiTImageProcessor, ViTImageProcessor

from modeling_mevit import MEViTCascade, MEViTConfig, export
from modeling_mevit.data.image_processing import on_pillow
from modeling_mevit.early_exit.cost import dynamic_exit_costs
from modeling_mevit.encoder_layer_mevit import encoder_layers, project_keys_values
from modeling_mevit.onnx import export as export_module
from modeling_mevit.onnx import writer
from modeling_mevit.onnx.cascade_mevit import Cascade, run
from modeling_mevit.onnx.export import ExportError
from modeling_mevit.onnx.graphs import build_graph, cascade_files, exit_file
from tests.helpers.models import tiny_model


@pytest.mark.parametrize(("layer", "file"), [(2, "exit_2.onnx"), (3, "exit_3.onnx"), (4, "model.onnx")])
@pytest.mark.parametrize("batch", [1, 3, 8])
@torch.no_grad()
def test_each_exit_is_the_models(exported, calibrated_model, images, layer, file, batch):
    expected = calibrated_model(images[:batch], early_exit=False)
    place = [2, 3, 4].index(layer)
    given = run(Cascade(exported).open(file), {"pixel_values": images[:batch].numpy()})
    np.testing.assert_allclose(given["logits"], expected.exit_logits[:, place], atol=1e-4)
    np.testing.assert_allclose(given["score"], expected.exit_scores[:, place], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 2, 16])
def test_a_layer_is_computed_for_any_number_of_query_tokens(exported, calibrated_model, images, queries):
    states = calibrated_model(images, early_exit=False, output_hidden_states=True).hidden_states
    layer = encoder_layers(calibrated_model.vit)[2]
    normed, keys, values = project_keys_values(layer, states[2])
    inputs = {"hidden_queries": states[2][:, :queries], "normed_queries": normed[:, :queries]}
    inputs = {name: value.numpy() for name, value in {**inputs, "keys": keys, "values": values}.items()}
    outputs = run(Cascade(exported).open("query_3.onnx"), inputs)["outputs"]
    np.testing.assert_allclose(outputs, states[3][:, :queries], atol=1e-4)


def test_graphs_tell_nothing_of_the_machine_that_wrote_them(exported):
    for file in sorted(exported.glob("*.onnx")):
        content = file.read_bytes()
        for trace in (b".py", b"stack_trace", b"pkg.torch"):
            assert trace not in content, file.name


def test_files_are_as_protobuf_writes_them(calibrated_model, tmp_path):
    model = writer.trace(build_graph(calibrated_model, cascade_files(3)[1]))
    expected = onnx_ir.to_proto(model)
    with (tmp_path / "model.onnx").open("wb") as file:
        writer.write_model(model, file)
    weights = {weight.name for weight in expected.graph.initializer}
    others = [value for value in expected.graph.value_info if value.name not in weights]  # whose shapes are there
    expected.graph.ClearField("value_info")
    expected.graph.value_info.extend(others)
    given = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(given, full_check=True)
    assert given == expected
    assert (tmp_path / "model.onnx").stat().st_size == expected.ByteSize()


def test_weights_that_no_message_can_hold_lie_beside_the_graph(calibrated_model, tmp_path, monkeypatch):
    graph = build_graph(calibrated_model, exit_file(2, [2, 3, 4]))
    monkeypatch.setattr(writer, "LARGEST_FILE", 10_000)
    monkeypatch.setattr(writer, "SMALL", 0)
    writer.write_graph(graph, tmp_path / "exit_2.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"exit_2.onnx", "exit_2.onnx_data"}
    export_module.compare_graph(graph, tmp_path / "exit_2.onnx")


def test_a_cascade_comes_with_the_last_exit_alone(tmp_path, calibrated_model, processor):
    files = export(calibrated_model, processor, tmp_path / "out", cascade=True).files
    graphs = {f"{kind}_{layer}.onnx" for kind in ("stage", "query") for layer in (2, 3, 4)}
    assert set(files) == {"model.onnx", *graphs}
    files = export(calibrated_model, processor, tmp_path / "exits").files
    assert set(files) == {"exit_2.onnx", "exit_3.onnx", "model.onnx"}


def test_each_fact_lies_in_one_file(exported, calibrated_model):
    description = json.loads((exported / "cascade.json").read_text())
    costs = dynamic_exit_costs(calibrated_model.config)
    assert description == {
        "precision": "float32",
        "target": None,
        "stages": [
            {
                "exit_layer": k,
                "stage": f"stage_{k}.onnx",
                "query": f"query_{k}.onnx",
                "score": "uncertainty",
                "cost": costs[k],
            }
            for k in (2, 3, 4)
        ],
    }
    config = MEViTConfig.from_pretrained(exported)
    assert config.exit_thresholds == [0.45, 0.6] and config.early_exit is True


def test_graphs_have_the_inputs_and_outputs_that_are_promised(exported):
    def names(file: str) -> tuple[list[str], list[str]]:
        graph = onnx.load(exported / file).graph
        return [one.name for one in graph.input], [one.name for one in graph.output]

    assert names("exit_2.onnx") == (["pixel_values"], ["logits", "score"])
    assert names("stage_2.onnx") == (["pixel_values"], ["hidden_state", "normed", "keys", "values"])
    assert names("stage_3.onnx") == (["previous"], ["normed", "keys", "values"])  # no layer between exits 2 and 3
    queries = ["hidden_queries", "normed_queries", "keys", "values"]
    assert names("query_4.onnx") == (queries, ["outputs", "logits", "score"])


def test_each_weight_lies_in_one_graph(tmp_path, processor):
    size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "exit_layers": [1, 2]}
    model = tiny_model(exit_thresholds=0.5, **size)
    files = export(model, processor, tmp_path / "out", cascade=True).files
    stages = sum(size for name, size in files.items() if name != "model.onnx")
    extra = sum(parameter.nbytes for parameter in model.exits["1"].parameters())
    assert stages <= 1.02 * files["model.onnx"] + extra + 30_000  # graphs without weights take a few kB each


def test_early_exit_that_is_not_wanted_is_off_in_the_export(tmp_path, calibrated_model, processor, images):
    export(calibrated_model, processor, tmp_path / "out", exits=[4], cascade=True, early_exit=False)
    assert MEViTConfig.from_pretrained(tmp_path / "out").early_exit is False
    assert calibrated_model.config.early_exit is True
    cascade = Cascade(tmp_path / "out")
    assert cascade(images.numpy()).exit_layer.tolist() == [4] * 8
    assert len(set(cascade(images.numpy(), early_exit=True).exit_layer)) > 1  # the thresholds are still there


@pytest.mark.parametrize(
    "make_processor",
    [
        lambda: ViTImageProcessor(size={"height": 16, "width": 16}),  # what most ViT checkpoints have
        lambda: DeiTImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False, do_rescale=False),
        lambda: DeiTImageProcessor(
            size={"height": 20, "width": 18}, crop_size={"height": 16, "width": 16}, do_normalize=False
        ),
    ],
)
def test_other_image_processors(exported, tmp_path, image_file, make_processor):
    processor = on_pillow(make_processor())
    processor.save_pretrained(shutil.copytree(exported, tmp_path / "out"))
    cascade = Cascade(tmp_path / "out")
    export_module.compare_preprocessing(processor, cascade)
    expected = processor(Image.open(image_file), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(cascade.preprocess([image_file]), expected, rtol=1e-5, atol=1e-5)


# Faults


def test_a_file_that_differs_fails_the_export(tmp_path, calibrated_model, processor, monkeypatch):
    write = export_module.write_graph

    def another_model(graph, file):
        bias = graph.module.model.exits["4"].classifier.bias
        with torch.no_grad():
            bias.add_(1.0)
        write(graph, file)
        with torch.no_grad():
            bias.sub_(1.0)

    monkeypatch.setattr(export_module, "write_graph", another_model)
    message = (
        r"logits of model.onnx differs from PyTorch's by 1\.00e\+00 on pixel_values \(1, 3, 16, 16\).*out.failed-"
    )
    with pytest.raises(ExportError, match=message):
        export(calibrated_model, processor, tmp_path / "out", exits=[4])
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("out.failed-") and (kept / "model.onnx").is_file()
    with pytest.raises(ValueError, match="not a finished export"):
        MEViTCascade.from_pretrained(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, r"exit_2.onnx does not run on pixel_values \(1, 3, 16, 16\): .*Got: 1 Expected: 3"),
        (
            {"logits": "answers"},
            r"the outputs of exit_2.onnx must be \['logits', 'score'\], got \['answers', 'score'\]",
        ),
    ],
)
def test_a_file_of_another_shape_or_other_outputs_is_an_error(exported, calibrated_model, tmp_path, change, message):
    """Such as one that is valid for the traced batch size alone."""
    model = onnx.load(exported / "exit_2.onnx")
    (before, after) = next(iter(change.items()))
    for given in model.graph.input:
        if isinstance(after, int):
            given.type.tensor_type.shape.dim[0].dim_value = after
    for node in model.graph.node:
        node.output[:] = [after if name == before else name for name in node.output]
    model.graph.output[0].name = after if before == "logits" else "logits"
    for node in model.graph.node:
        node.input[:] = [after if name == before else name for name in node.input]
    onnx.save(model, tmp_path / "exit_2.onnx")
    with pytest.raises(ExportError, match=message):
        export_module.compare_graph(build_graph(calibrated_model, exit_file(2, [2, 3, 4])), tmp_path / "exit_2.onnx")


def test_unknown_exporters_are_named(tmp_path, calibrated_model, processor):
    with pytest.raises(ValueError, match="exporter must be 'torch' or 'optimum', got 'onnx'"):
        export(calibrated_model, processor, tmp_path / "out", exporter="onnx")
    assert not list(tmp_path.iterdir())


def test_where_optimum_does_not_run_another_exporter_is_named(tmp_path, calibrated_model, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    monkeypatch.delitem(sys.modules, "modeling_mevit.onnx.optimum_exporter", raising=False)
    message = r"exporter must be 'torch' here, got 'optimum', which cannot .* pip install 'mevit\[optimum\]'"
    with pytest.raises(ValueError, match=message):
        export(calibrated_model, processor, tmp_path / "out", exporter="optimum")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing_that_loads(tmp_path, calibrated_model, processor, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "compare_preprocessing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(calibrated_model, processor, tmp_path / "out", exits=[4], cascade=True)
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_nothing_that_runs(tmp_path):
    """Killed as late as can be: everything is written and converted but for the last two files."""
    program = f"""
import os, signal
from modeling_mevit import MEViTConfig, export
from modeling_mevit.data.image_processing import image_processor_for
from tests.helpers.models import tiny_model

processor = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
model = tiny_model(num_hidden_layers=2, exit_layers=[1, 2], exit_thresholds=0.5, early_exit=True)
save = MEViTConfig.save_pretrained

def killed(self, directory):
    save(self, directory)
    os.kill(os.getpid(), signal.SIGKILL)

MEViTConfig.save_pretrained = killed
export(model, processor, {str(tmp_path / "out")!r}, cascade=True)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True)
    assert result.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out-")
    assert (left / "out" / "stage_2.onnx").is_file()
    for directory in (left, left / "out"):
        with pytest.raises(ValueError, match="is not a finished export of a cascade; it has no cascade.json"):
            Cascade(directory)
        run = subprocess.run(
            [sys.executable, left / "out" / "cascade_mevit.py", directory, "x.png"], capture_output=True
        )
        assert run.returncode == 1 and b"not a finished export" in run.stderr


def test_directories_of_others_are_left_alone(tmp_path):
    for name in ("out.partial", "out.failed", ".out-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    with export_module.atomic_directory(tmp_path / "out") as directory:
        assert directory.parent.parent == tmp_path and not (tmp_path / "out").exists()
        (directory / "file").write_text("new")
    with (
        pytest.raises(ExportError, match=r"it differs. What was written is in .*out.failed-") as raised,
        export_module.atomic_directory(tmp_path / "out"),
    ):
        raise ExportError("it differs.")
    kept = str(raised.value).split(" is in ")[1].rstrip(".")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [".out-mine", "out", "out.failed", "out.partial", Path(kept).name]
    )
    for name in ("out.partial", "out.failed", ".out-mine"):
        assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_an_export_has_the_permissions_of_other_directories(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with export_module.atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_cascade_json_is_written_last(tmp_path, calibrated_model, processor, monkeypatch):
    written = []
    write = export_module._write_json
    monkeypatch.setattr(
        export_module,
        "_write_json",
        lambda file, content: (written.extend(file.parent.iterdir()), write(file, content)),
    )
    files = list(export(calibrated_model, processor, tmp_path / "out", exits=[3], cascade=True).directory.iterdir())
    assert {"exit_3.onnx", "model.onnx"} <= {file.name for file in files}  # the last exit is always beside a cascade
    assert {file.name for file in files} == {file.name for file in written} | {"cascade.json"}


def test_a_cascade_with_other_logits_is_an_error(exported, calibrated_model):
    cascade = Cascade(exported)
    export_module.compare_cascade(calibrated_model, cascade)
    with torch.no_grad():
        calibrated_model.exits["3"].classifier.bias.add_(0.5)
    with pytest.raises(ExportError, match="logits of exit 3 differ from PyTorch's by 5.00e-01; allowed is 0.0001"):
        export_module.compare_cascade(calibrated_model, cascade)


def test_a_cascade_that_leaves_elsewhere_is_an_error(exported, calibrated_model, monkeypatch):
    call = Cascade.__call__

    def one_late(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        output.exit_layer[output.exit_layer.argmin()] = 4
        return output

    monkeypatch.setattr(Cascade, "__call__", one_late)
    with pytest.raises(ExportError, match="[1-4] of 8 images leave the cascade at another exit"):
        export_module.compare_cascade(calibrated_model, Cascade(exported))


def test_a_runtime_that_reads_images_otherwise_is_an_error(exported, processor, monkeypatch):
    read = Cascade.preprocess
    export_module.compare_preprocessing(processor, Cascade(exported))
    monkeypatch.setattr(Cascade, "preprocess", lambda self, images: read(self, images) + 0.02)
    with pytest.raises(ExportError, match="a value differs by 2.0 grey levels, allowed is 0.1"):
        export_module.compare_preprocessing(processor, Cascade(exported))


def test_an_image_processor_on_torchvision_is_told_from_the_runtime(exported, tmp_path, calibrated_model, processor):
    """It differs by one grey level in some values. An export takes its sibling on Pillow."""
    on_torchvision = DeiTImageProcessor.from_dict(processor.to_dict())
    if type(on_torchvision) is type(processor):
        pytest.skip("this version of Transformers has no image processor on torchvision of that name")
    with pytest.raises(ExportError, match=r"a value differs by \d\.\d grey levels, allowed is 0.1"):
        export_module.compare_preprocessing(on_torchvision, Cascade(exported))
    export(calibrated_model, on_torchvision, tmp_path / "out", cascade=True)
    written = [(folder / "preprocessor_config.json").read_text() for folder in (exported, tmp_path / "out")]
    assert written[0] == written[1]


@pytest.mark.parametrize("comparison", ["compare_cascade", "compare_preprocessing"])
def test_the_export_makes_every_comparison(tmp_path, calibrated_model, processor, monkeypatch, comparison):
    def fail(*args):
        raise ExportError("it differs.")

    monkeypatch.setattr(export_module, "export_and_compare", lambda *args: None)
    monkeypatch.setattr(export_module, "unfinished_cascade", lambda *args, **settings: None)
    monkeypatch.setattr(export_module, "compare_cascade", lambda *args: None)
    monkeypatch.setattr(export_module, comparison, fail)
    with pytest.raises(ExportError, match="it differs"):
        export(calibrated_model, processor, tmp_path / "out", cascade=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make_processor", "message"),
    [
        (lambda: BitImageProcessor(size={"shortest_edge": 16}), r"size must be height and width, got {'shortest_edge"),
        (
            lambda: ViTImageProcessor(size={"height": 20, "width": 20}),
            r"must make images of \(16, 16\), which the model needs, got \(20, 20\)",
        ),
    ],
)
def test_image_processors_that_the_runtime_cannot_follow(tmp_path, calibrated_model, make_processor, message):
    with pytest.raises(ValueError, match=message):
        export(calibrated_model, make_processor(), tmp_path / "out", cascade=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"exits": [1, 4]}, r"exits must be some of the model's, \[2, 3, 4\], got \[1, 4\]"),
        ({}, {"exits": []}, r"exits must be some of the model's, \[2, 3, 4\], got \[\]"),
        ({}, {"cascade": True}, "early exit needs exit_thresholds"),
        ({"exit_layers": [4]}, {"cascade": True}, "needs at least two exits; the model has one, on layer 4"),
    ],
)
def test_what_the_model_lacks_is_named(tmp_path, processor, settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(tiny_model(**settings), processor, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_not_empty_is_refused(tmp_path, calibrated_model, processor):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is not empty"):
        export(calibrated_model, processor, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
