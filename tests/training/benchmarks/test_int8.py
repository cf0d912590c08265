# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import onnx
import pytest


pytest.importorskip("onnxscript", reason="needs the extra mevit[onnx]")

import int8
from modeling_mevit import MEViTConfig, export
from modeling_mevit.data.image_processing import image_processor_for
from modeling_mevit.onnx.graphs import cascade_files
from tests.helpers.models import tiny_model
from tests.helpers.random_images import RandomImages


pytestmark = [pytest.mark.one_major, pytest.mark.slow]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "out"
    processor = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = tiny_model(num_hidden_layers=3, exit_layers=[2, 3], exit_policy="margin")
    return export(model, processor, output, cascade=True, early_exit=False).directory


def test_measures_every_way(exported, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(int8.DataSource, "load", lambda *given: RandomImages(12))
    arguments = [str(exported), "--data", "photos", "--target", "avx2", "--output", str(tmp_path / "int8.json")]
    arguments = ["--export", *arguments]
    results = int8.main(arguments)
    assert json.loads((tmp_path / "int8.json").read_text()) == results
    assert list(results["rows"]) == ["float32", *int8.WAYS] and results["exit_layers"] == [2, 3]
    assert all(len(row["accuracy"]) == len(row["agreement"]) == 2 for row in results["rows"].values())
    assert results["rows"]["float32"]["agreement"] == [1.0, 1.0]
    assert "| int8 | exit 2 | exit 3 | same label as in float32 |" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [("first", "last"), ()])
def test_the_first_and_the_last_layer_can_stay_in_float32(exported, tmp_path, layers):
    config = MEViTConfig.from_pretrained(exported)
    directory = tmp_path / "int8"
    directory.mkdir()
    int8.convert(exported, directory, config, RandomImages(2), "avx2", {"layers_in_float": layers})
    rounded = {
        file.name: sum(node.op_type == "QuantizeLinear" for node in onnx.load(directory / file.name).graph.node)
        for layer in config.exit_layers
        for file in cascade_files(layer)
    }
    assert (rounded["stage_3.onnx"] == rounded["query_3.onnx"] == 0) == bool(layers)
    assert rounded["query_2.onnx"] > 0 and rounded["stage_2.onnx"] > 0


def test_an_unknown_way_is_named():
    with pytest.raises(ValueError, match="ways must be some of .*, got .'by hand'."):
        int8.Int8Arguments("out", "photos", ways=["by hand"])
