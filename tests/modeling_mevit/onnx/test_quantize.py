# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from modeling_mevit import (
    CalibrationResult,
    CalibrationTarget,
    DataSource,
    MEViTCascade,
    MEViTConfig,
    calibrate,
    export,
)
from modeling_mevit.checkpoint import quantization_for
from modeling_mevit.data.image_processing import image_processor_for
from modeling_mevit.early_exit.predictions import predict_exits
from modeling_mevit.exit_policy_mevit import EXIT_COMBINATIONS
from modeling_mevit.onnx import cascade_mevit, quantize
from modeling_mevit.onnx.graphs import build_graph, cascade_files, exit_file
from modeling_mevit.onnx.quantize import PRECISIONS, WITHOUT_TARGET, Quantization
from modeling_mevit.onnx.writer import write_graph
from tests.helpers.float16_graphs import assert_heads_alone_are_in_float32
from tests.helpers.images import write_image
from tests.helpers.models import tiny_model
from tests.helpers.openvino_here import needs_bfloat16


PROCESSOR = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
FILES = [exit_file(4, [2, 3, 4]), *cascade_files(2), *cascade_files(3), *cascade_files(4)]


class Images(torch.utils.data.Dataset):
    """Noise whose labels are what the model's last exit predicts."""

    def __init__(self, model, count: int, seed: int):
        self.pixel_values = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.labels = model(self.pixel_values, early_exit=False).logits.argmax(-1).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def describe(self) -> dict:
        return {"name": "noise", "split": "validation", "half": None, "sha256": "1", "image_digests": ""}


def calibrated(model):
    calibrate(model, Images(model, 60, seed=1), CalibrationTarget(max_accuracy_drop=0.05)).apply_to(model.config)
    assert model.config.early_exit
    return model


@pytest.fixture(scope="module")
def model():
    return calibrated(tiny_model(exit_policy="margin"))


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory, model) -> Path:
    """The last exit and the cascade in float32; not to be changed."""
    output = tmp_path_factory.mktemp("float32") / "out"
    export(model, PROCESSOR, output, exits=[4], cascade=True)
    return output


@pytest.mark.parametrize("combination", EXIT_COMBINATIONS)
@pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=needs_bfloat16 if name == "bfloat16" else ()) for name in PRECISIONS]
)
def test_lower_precision_predicts_alike_and_is_calibrated_anew(tmp_path, precision, combination):
    model = calibrated(tiny_model(exit_policy="margin", exit_combination=combination))
    training, calibration = Images(model, 16, seed=2), Images(model, 60, seed=1)
    before = list(model.config.exit_thresholds)
    target = None if precision in WITHOUT_TARGET else "avx2"
    quantization = Quantization(precision, calibration, training, target=target)
    report = export(model, PROCESSOR, tmp_path / "out", exits=[4], cascade=True, quantization=quantization).report
    assert model.config.exit_thresholds == before

    cascade = MEViTCascade.from_pretrained(tmp_path / "out")
    logits = cascade(calibration.pixel_values, early_exit=False).exit_logits.numpy()
    with torch.no_grad():
        expected = model(calibration.pixel_values, early_exit=False).exit_logits.numpy()
    assert 0 < np.abs(logits - expected).max() < {"float16": 0.05, "bfloat16": 0.2}.get(precision, 1.5)
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.85

    config = MEViTConfig.from_pretrained(tmp_path / "out")
    found = config.calibration
    assert config.early_exit and found["target"] == {"max_accuracy_drop": 0.05}
    assert found["made_for"]["exit_combination"] == config.exit_combination == combination
    assert found["made_for"]["dtype"] == cascade.precision == precision
    assert found["data"].items() >= calibration.describe().items()
    # int8-dynamic is calibrated image by image, since its results depend on the batch
    predictions = predict_exits(cascade, calibration, batch_size=1 if precision == "int8-dynamic" else 32)
    point = predictions.simulate("margin", config.exit_thresholds)
    assert point.drop <= 0.05 and point.to_dict() == found["operating_point"]
    assert report.calibration.operating_point.cost == point.cost

    written = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert written == report.to_dict()
    accuracy = written["accuracy"]["model.onnx"]
    assert accuracy["float32"] == 1.0  # the labels are its own
    last = cascade(calibration.pixel_values, early_exit=False).logits.argmax(-1).numpy()
    assert accuracy[precision] == pytest.approx((last == calibration.labels).mean(), abs=0.1)
    described = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert (described["precision"], described["target"]) == (precision, target)
    assert (written["precision"], written["target"], written["num_samples"]) == (precision, target, 60)


# Files for the device that runs


@pytest.mark.parametrize(
    ("target", "activations", "bits"), [("arm64", "INT8", 8), ("avx2", "UINT8", 7), ("avx512_vnni", "UINT8", 8)]
)
def test_int8_files_are_made_for_their_target(in_float32, model, tmp_path, target, activations, bits):
    directory = shutil.copytree(in_float32, tmp_path / "out")
    quantization = Quantization("int8", Images(model, 1, 1), Images(model, 2, 2), target)
    quantize.convert(directory, FILES, model.config, quantization)
    graph = onnx.load(directory / "query_3.onnx").graph
    assert _types_of_activations(graph) == {activations}
    assert (_largest_weight(graph) <= 64) == (bits == 7)


@pytest.mark.parametrize(("target", "bits"), [("arm64", 8), ("avx2", 7), ("avx512_vnni", 8)])
def test_dynamic_int8_files_are_made_for_their_target(in_float32, model, tmp_path, target, bits):
    directory = shutil.copytree(in_float32, tmp_path / "out")
    quantize.convert(
        directory, FILES[:1], model.config, Quantization("int8-dynamic", Images(model, 1, 1), None, target)
    )
    assert (_largest_weight(onnx.load(directory / "model.onnx").graph) <= 64) == (bits == 7)


def test_the_target_is_by_default_this_machine(model, monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    quantization = Quantization("int8-dynamic", Images(model, 2, 1))
    assert quantization.target == "arm64"
    report = export(model, PROCESSOR, tmp_path / "out", exits=[2], quantization=quantization).report
    assert report.target == "arm64"
    assert json.loads((tmp_path / "out" / "precision.json").read_text())["target"] == "arm64"


@pytest.mark.parametrize(
    ("machine", "flags", "target"),
    [
        ("arm64", "", "arm64"),
        ("x86_64", "flags : sse2 avx2", "avx2"),
        ("AMD64", "flags : avx2 avx_vnni", "avx512_vnni"),
        ("x86_64", "flags : avx2 avx512f avx512_vnni", "avx512_vnni"),
    ],
)
def test_the_machine_is_told_by_its_processor(monkeypatch, tmp_path, machine, flags, target):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(quantize, "CPU_INFO", tmp_path / "cpuinfo")
    assert quantize.host_target() == target
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="a target must be given on a machine of type 'riscv64': 'arm64', 'avx2'"):
        quantize.host_target()


def _types_of_activations(graph: onnx.GraphProto) -> set[str]:
    """Types of the zero points of what is quantized while the graph runs."""
    types = {one.name: onnx.TensorProto.DataType.Name(one.data_type) for one in graph.initializer}
    return {types[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}


def _largest_weight(graph: onnx.GraphProto) -> int:
    weights = [onnx.numpy_helper.to_array(one) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
    return max(int(np.abs(weight.astype(int)).max()) for weight in weights if weight.ndim == 2)


# What is quantized, and with which ranges


def test_heads_and_products_of_activations_stay_in_float(in_float32, model, tmp_path):
    directory = shutil.copytree(in_float32, tmp_path / "out")
    quantize.convert(
        directory, FILES, model.config, Quantization("int8", Images(model, 1, 1), Images(model, 1, 2), "avx2")
    )
    for file in FILES:
        before = onnx.load(in_float32 / file.name).graph
        weights = {initializer.name for initializer in before.initializer}
        given_to = {node.name: " ".join(node.input) for node in before.node}
        after = onnx.load(directory / file.name).graph
        nodes = {node.name: node for node in after.node}
        rounded = {node.input[0] for node in after.node if node.op_type == "QuantizeLinear"}
        in_float = []
        for product in (node for node in before.node if node.op_type in ("MatMul", "Gemm")):
            is_int8 = any("DequantizeLinear" in given for given in nodes[product.name].input)
            assert not rounded.intersection(nodes[product.name].output)  # products stay as they are
            is_head = ".classifier.weight" in given_to[product.name]
            assert is_int8 == (not is_head and bool(weights & set(product.input))), (file.name, product.name)
            in_float += [product.name] * (not is_int8)
        if file.kind != "stage":
            assert any(".classifier.weight" in given_to[name] for name in in_float), file.name
            assert any(".classifier.weight" not in given_to[name] for name in in_float), file.name
    assert {entry.name for entry in directory.iterdir()} == {entry.name for entry in in_float32.iterdir()}


def test_each_graph_gets_the_inputs_it_has_in_a_run(in_float32, model):
    training = Images(model, 3, seed=2)
    feeds = dict(quantize.training_feeds(in_float32, FILES, model.config, training))
    assert list(feeds) == [file.name for file in FILES]
    given = np.concatenate([feed["pixel_values"] for feed in feeds["model.onnx"]])
    np.testing.assert_array_equal(np.sort(given, axis=0), np.sort(training.pixel_values.numpy(), axis=0))
    with torch.no_grad():
        states = model(torch.from_numpy(given), early_exit=False, output_hidden_states=True).hidden_states
    for layer in (3, 4):  # neighbouring exits: what one leaves is what the next one's layer reads
        previous = np.concatenate([feed["previous"] for feed in feeds[f"stage_{layer}.onnx"]])
        np.testing.assert_allclose(previous, states[layer - 1].numpy(), atol=1e-4)
    queries = feeds["query_4.onnx"]
    given = np.concatenate([feed["hidden_queries"] for feed in queries])
    np.testing.assert_allclose(given, states[3].numpy(), atol=1e-4)


def test_ranges_do_not_depend_on_the_sum_of_the_exits_passed(tmp_path, monkeypatch):
    """Which is fed as zeros, and which the predictor, too, reads in the combination."""
    model = tiny_model(exit_policy="uncertainty", exit_combination="mean", exit_thresholds=0.5)
    export(model, PROCESSOR, tmp_path / "out", exits=[4], cascade=True)
    quantization = Quantization("int8", Images(model, 1, 1), Images(model, 3, 2), "avx2")
    files, inputs, others = [], quantize.query_inputs, np.arange(5, dtype=np.float32)[None] * -10
    for passed in ("zeros", "others"):
        directory = shutil.copytree(tmp_path / "out", tmp_path / passed)
        quantize.convert(directory, FILES, model.config, quantization)
        files.append({file.name: (directory / file.name).read_bytes() for file in FILES})
        monkeypatch.setattr(quantize, "query_inputs", lambda *given: inputs(*given[:3], others))
    assert files[0] == files[1]


# float16


@pytest.mark.parametrize("combination", EXIT_COMBINATIONS)
def test_norms_stay_whole_and_heads_in_float32(tmp_path, combination):
    """A norm that is written as its mean, variance and root overflows in float16, as do large weights of exits."""
    model = tiny_model(exit_policy="uncertainty", uncertainty_input="probabilities", exit_combination=combination)
    directory = tmp_path / "out"
    export(model, PROCESSOR, directory, exits=[3, 4], cascade=True, early_exit=False)
    before = {file.name: onnx.load(directory / file.name) for file in FILES}
    quantize.convert(directory, FILES, model.config, Quantization("float16", Images(model, 1, 1)))
    for file in FILES:
        own_exits = (2, 3, 4) if combination == "mean" and file.kind == "exit" else (file.exit_layer,)
        layers = {"exit": 2 * file.exit_layer, "query": 1, "stage": 1 if file.exit_layer > 2 else 3}[file.kind]
        num_heads = 0 if file.kind == "stage" else len(own_exits)
        after = onnx.load(directory / file.name)
        onnx.checker.check_model(after, full_check=True)
        for graph in (before[file.name].graph, after.graph):
            operators = [node.op_type for node in graph.node]
            assert operators.count("LayerNormalization") == layers + num_heads, file.name
            assert not {"ReduceMean", "Sqrt", "Pow"} & set(operators)
            assert operators.count("Gemm") == num_heads
        assert_heads_alone_are_in_float32(after)


def test_a_norm_with_large_weights_does_not_overflow_in_float16(tmp_path):
    model = tiny_model(exit_policy="entropy")
    with torch.no_grad():
        for layer, norm in ((2, model.exits["2"].norm), (4, model.vit.layernorm)):
            norm.weight.mul_(1e6)
            norm.bias.mul_(1e6)
            model.exits[str(layer)].classifier.weight.mul_(1e-6)
    files = [*cascade_files(2), exit_file(4, [2, 3, 4])]
    for file in files:
        write_graph(build_graph(model, file), tmp_path / file.name)
    quantize.convert(tmp_path, files, model.config, Quantization("float16", Images(model, 1, 1)))
    pixel_values = Images(model, 4, seed=3).pixel_values
    stage, query, whole = (cascade_mevit.OnnxRuntimeGraph(tmp_path / file.name) for file in files)
    tokens = cascade_mevit.run_stage(stage, pixel_values.numpy())
    inputs = cascade_mevit.query_inputs(query, tokens, cascade_mevit.CLS, np.zeros((4, 5), dtype=np.float32))
    with torch.no_grad():
        expected = model(pixel_values, early_exit=False).exit_logits.numpy()
    at_exit_2 = cascade_mevit.run(query, inputs)["logits"]
    at_the_end = cascade_mevit.run(whole, {"pixel_values": pixel_values.numpy()})["logits"]
    np.testing.assert_allclose(at_exit_2, expected[:, 0], atol=0.05)
    np.testing.assert_allclose(at_the_end, expected[:, 2], atol=0.05)


# Thresholds


def test_early_exit_that_was_not_wanted_stays_off(tmp_path, model):
    quantization = Quantization("int8-dynamic", Images(model, 30, 1))
    output = tmp_path / "out"
    report = export(
        model, PROCESSOR, output, exits=[4], cascade=True, early_exit=False, quantization=quantization
    ).report
    config = MEViTConfig.from_pretrained(output)
    assert config.early_exit is False
    assert config.exit_thresholds == report.calibration.operating_point.thresholds


def test_early_exit_is_off_where_nothing_can_be_certified(in_float32, tmp_path, model, monkeypatch):
    directory, config = shutil.copytree(in_float32, tmp_path / "out"), copy.deepcopy(model.config)
    nothing = CalibrationResult(CalibrationTarget(max_accuracy_drop=0.05), None)
    monkeypatch.setattr(quantize, "calibrate", lambda *args, **kwargs: nothing)
    quantization = Quantization("float16", Images(model, 30, 1))
    result = quantize.lower_precision(directory, FILES, config, quantization).calibration
    assert result is nothing
    assert (config.early_exit, config.exit_thresholds, config.calibration) == (False, None, None)


def test_too_few_images_to_certify_are_told_before_anything_is_written(tmp_path, model):
    certified = copy.deepcopy(model)
    certified.config.calibration["target"] = {"max_accuracy_drop": 0.05, "confidence": 0.95, "bound": "harm"}
    quantization = Quantization("int8-dynamic", Images(model, 58, 1))
    with pytest.raises(ValueError, match="at least 59 images are needed to certify a drop of at most 5.00% .* got 58"):
        export(certified, PROCESSOR, tmp_path / "out", cascade=True, quantization=quantization)
    assert not list(tmp_path.iterdir())


def test_thresholds_of_float32_do_not_outlive_it(tmp_path):
    by_hand = tiny_model(exit_thresholds=0.5, early_exit=True)
    quantization = Quantization("float16", Images(by_hand, 8, 1))
    with pytest.raises(ValueError, match="set by hand"):
        export(by_hand, PROCESSOR, tmp_path / "out", cascade=True, quantization=quantization)
    report = export(by_hand, PROCESSOR, tmp_path / "out", exits=[4], quantization=quantization).report
    assert report.calibration is None
    config = MEViTConfig.from_pretrained(tmp_path / "out")
    assert config.exit_thresholds is None and config.early_exit is False
    assert by_hand.config.early_exit is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int4"}, "precision must be one of 'float16', 'bfloat16', 'int8', 'int8-dynamic', got 'int4'"),
        ({"precision": "int8-dynamic", "target": "avx"}, "target must be one of 'arm64', 'avx2', 'avx512_vnni', got"),
        ({"precision": "float16", "target": "avx2"}, "target must be left out with float16"),
        ({"precision": "bfloat16", "target": "avx2"}, "target must be left out with bfloat16"),
        ({"precision": "int8"}, "'int8' needs training images"),
    ],
)
def test_unknown_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantization(calibration=[], **arguments)


def test_thresholds_are_chosen_anew_on_labelled_images(in_float32, model, tmp_path):
    """What an accuracy report needs; images that calibrated without labels are not in the training data."""
    config = copy.deepcopy(model.config)
    config.calibration["data"]["split"] = "unlabelled"
    with pytest.raises(ValueError, match="--split must name the images that choose the thresholds anew"):
        quantization_for(config, PROCESSOR, DataSource("photos", ""), "float16", None)
    write_image(tmp_path / "phone" / "0.png")
    for split in ("", "validation", "unlabelled"):
        with pytest.raises(ValueError, match="--data must have labels, .*; got .*phone without labels"):
            quantization_for(model.config, PROCESSOR, DataSource(tmp_path / "phone", split), "int8", None)
    shutil.copytree(in_float32, tmp_path / "out")
    unlabelled = [{"pixel_values": pixel_values} for pixel_values in torch.randn(3, 3, 16, 16)]
    with pytest.raises(ValueError, match="a lower precision needs labels, and these 3 images have none"):
        quantize.lower_precision(tmp_path / "out", FILES, config, Quantization("float16", calibration=unlabelled))
