# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from modeling_mevit.early_exit.calibration import calibrate, enable_early_exit
from modeling_mevit.data import image_processor_for
from modeling_mevit.early_exit.predictions import predict_exits
from tests.helpers.models import tiny_model


pytest.importorskip("optimum.exporters.onnx", reason="needs the extra mevit[onnx]")

import onnx  # noqa: E402

from modeling_mevit.onnx import quantize  # noqa: E402
from modeling_mevit.onnx.cascade_mevit import Cascade  # noqa: E402
from modeling_mevit.onnx.export import export  # noqa: E402


PROCESSOR = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3)


class Images(torch.utils.data.Dataset):
    """Noise whose labels are what the model's last exit says of most."""

    def __init__(self, model, count: int, seed: int):
        self.pixel_values = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.labels = model(self.pixel_values, early_exit=False).logits.argmax(-1).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


@pytest.fixture(scope="module")
def model():
    model = tiny_model(exit_policy="margin")
    record = predict_exits(model, Images(model, 60, seed=1))
    found = calibrate(record, "margin", {"max_accuracy_drop": 0.05}, per_exit=False, num_labels=5).granted
    source = {"name": "noise", "split": "validation", "half": None, "sha256": "0"}
    enable_early_exit(model.config, found, {"max_accuracy_drop": 0.05}, per_exit=False, source=source)
    return model


@pytest.mark.parametrize("precision", quantize.PRECISIONS)
def test_lower_precision_answers_alike_and_is_calibrated_anew(tmp_path, model, precision):
    training, calibration = Images(model, 40, seed=2), Images(model, 60, seed=1)
    source = {"name": "noise", "split": "validation", "half": None, "sha256": "1"}
    quantization = quantize.Quantization(precision, training, calibration, source, training_images=16)
    before = list(model.config.exit_thresholds)
    export(model, PROCESSOR, tmp_path / "out", cascade=True, quantization=quantization)
    assert model.config.exit_thresholds == before

    cascade = Cascade(tmp_path / "out")
    logits, scores = cascade.every_exit(calibration.pixel_values.numpy())
    with torch.no_grad():
        expected = model(calibration.pixel_values, early_exit=False).exit_logits.numpy()
    assert 0 < np.abs(logits - expected).max() < (0.05 if precision == "float16" else 1.5)
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.85

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    description = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert config["calibration"] == description["calibration"] and description["early_exit"] is True
    assert config["calibration"]["data"] == source
    assert config["exit_thresholds"] == description["thresholds"]
    record = quantize.record_cascade(cascade, calibration, batch_size=1)
    if precision != "int8-dynamic":  # whose answers depend on the batch
        np.testing.assert_allclose(record.scores["margin"], scores, atol=1e-5)
    outcome = record.outcome(record.places("margin", description["thresholds"]))
    assert outcome.drop <= 0.05 and outcome.cost == pytest.approx(config["calibration"]["measured"]["cost"])

    report = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert report["accuracy"]["model.onnx"]["float32"] == 1.0  # the labels are its own
    assert report["accuracy"]["model.onnx"][precision] == pytest.approx(
        (logits[:, -1].argmax(-1) == calibration.labels).mean(), abs=0.1
    )
    assert report["early_exit"]["cost"] == pytest.approx(outcome.cost)


def test_heads_and_products_of_activations_stay_in_float(tmp_path, model):
    files = export(model, PROCESSOR, tmp_path / "out", cascade=True, early_exit=False).files
    before = {name: onnx.load(tmp_path / "out" / name) for name in files}
    quantize.convert(tmp_path / "out", "int8", [np.zeros((1, 3, 16, 16), np.float32)], reduce_range=True)
    for name, graph in before.items():
        weights = {initializer.name for initializer in graph.graph.initializer}
        nodes = {node.name: node for node in onnx.load(tmp_path / "out" / name).graph.node}
        in_float = []
        for product in (node for node in graph.graph.node if node.op_type in ("MatMul", "Gemm")):
            is_int8 = any("DequantizeLinear" in given for given in nodes[product.name].input)
            is_head = "/classifier/" in product.name or "/uncertainty/" in product.name
            assert is_int8 == (not is_head and bool(weights & set(product.input))), (name, product.name)
            in_float += [product.name] * (not is_int8)
        if name.startswith("stage"):
            continue
        assert any("/classifier/" in kept for kept in in_float), name
        assert any("/classifier/" not in kept and "/uncertainty/" not in kept for kept in in_float), name
    assert not (tmp_path / "out" / "converted").exists()


def test_weights_of_7_bits_where_sums_saturate(tmp_path, model, monkeypatch):
    largest = {}
    for reduce_range in (True, False):
        directory = tmp_path / str(reduce_range)
        export(model, PROCESSOR, directory, exits=[4])
        quantize.convert(directory, "int8-dynamic", [], reduce_range=reduce_range)
        weights = [
            onnx.numpy_helper.to_array(one)
            for one in onnx.load(directory / "model.onnx").graph.initializer
            if one.data_type == onnx.TensorProto.INT8
        ]
        largest[reduce_range] = max(int(np.abs(weight.astype(int)).max()) for weight in weights if weight.ndim == 2)
    assert largest[True] <= 64 < largest[False]
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert quantize.needs_reduced_range() is False


def test_early_exit_that_was_not_wanted_stays_off(tmp_path, model):
    quantization = quantize.Quantization(
        "int8-dynamic", Images(model, 8, 2), Images(model, 30, 1), {"name": "noise"}
    )
    export(model, PROCESSOR, tmp_path / "out", exits=[4], cascade=True, early_exit=False, quantization=quantization)
    assert json.loads((tmp_path / "out" / "cascade.json").read_text())["early_exit"] is False


def test_thresholds_of_float32_do_not_outlive_it(tmp_path):
    by_hand = tiny_model(exit_thresholds=0.5, early_exit=True)
    quantization = quantize.Quantization("float16", Images(by_hand, 8, 2), Images(by_hand, 8, 1), {})
    with pytest.raises(ValueError, match="set by hand"):
        export(by_hand, PROCESSOR, tmp_path / "out", cascade=True, quantization=quantization)
    export(by_hand, PROCESSOR, tmp_path / "out", quantization=quantization)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["exit_thresholds"] is None and config["early_exit"] is False
    assert by_hand.config.early_exit is True


def test_an_unknown_precision_is_named(tmp_path):
    with pytest.raises(ValueError, match="precision='int4' is unknown; allowed are 'float16', 'int8', 'int8-dynamic'"):
        quantize.convert(tmp_path, "int4", [])
