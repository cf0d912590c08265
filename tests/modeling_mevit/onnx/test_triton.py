# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The model repository for Triton, on a stand-in for its server and the real graphs."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_mevit import MEViTForImageClassification
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.onnx.export import export
from modeling_mevit.onnx.triton_repository import MAX_BATCH, write_repository
from tests.helpers.models import thirds_as_thresholds, tiny_model
from tests.helpers.triton_model import Server, parse_pbtxt


pytestmark = pytest.mark.one_major

POLICIES = [("uncertainty", "none"), ("margin", "mean"), ("patience", "none")]


def model_of(policy: str, combination: str) -> MEViTForImageClassification:
    # of a seed whose exits agree on some images
    model = tiny_model(4 if policy == "patience" else 0, exit_policy=policy, exit_combination=combination)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    thresholds = [0.5, 0.5] if policy == "patience" else thirds_as_thresholds(model, images)
    model.config.exit_thresholds, model.config.early_exit = thresholds, True
    return model


@pytest.fixture(scope="module", params=POLICIES, ids="-".join)
def directory(request, processor, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("triton") / "out"
    export(model_of(*request.param), processor, output, cascade=True, triton=True)
    return output


@pytest.fixture
def server(directory, monkeypatch) -> Server:
    return Server(directory / "triton", monkeypatch)


def outputs_of(answer) -> tuple[np.ndarray, np.ndarray]:
    """Logits and exit layers of an answer."""
    assert not answer.has_error(), answer.error().message()
    values = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
    return values["logits"], values["exit_layer"]


def test_answers_are_those_of_the_runtime(directory, server, images):
    expected = Cascade(directory)(images.numpy())
    assert len(set(expected.exit_layer.tolist())) > 1
    (answer,) = server.request("mevit", [{"pixel_values": images.numpy()}])
    logits, exit_layer = outputs_of(answer)
    assert exit_layer.tolist() == [[layer] for layer in expected.exit_layer]
    np.testing.assert_allclose(logits, expected.logits, atol=1e-5)


def test_requests_are_answered_as_one_batch_that_shrinks(directory, server, images):
    expected = Cascade(directory)(images.numpy())
    parts = [images.numpy()[:1], images.numpy()[1:6], images.numpy()[6:]]
    answers = server.request("mevit", [{"pixel_values": part} for part in parts])
    assert [len(outputs_of(answer)[0]) for answer in answers] == [1, 5, 2]
    logits, exit_layer = (np.concatenate(values) for values in zip(*map(outputs_of, answers), strict=True))
    assert exit_layer[:, 0].tolist() == expected.exit_layer.tolist()
    np.testing.assert_allclose(logits, expected.logits, atol=1e-5)
    stages = [count for name, count in server.asked if "_stage_" in name]
    going_on = [8, int((expected.exit_layer > 2).sum()), int((expected.exit_layer > 3).sum())]
    assert stages == [count for count in going_on if count] and min(stages) < 8


def test_a_stage_that_fails_is_told(server, images):
    run = server._run

    def fails(name, config, request):
        return run(name, config, {} if name == "mevit_query_3" else request)

    server._run = fails
    (answer,) = server.request("mevit", [{"pixel_values": images.numpy()}])
    assert answer.has_error() and "mevit_query_3" in answer.error().message()
    assert "\n" not in answer.error().message()


def test_another_name_is_given_by_the_folders(directory, monkeypatch, images, tmp_path):
    for folder in (directory / "triton").iterdir():
        target = tmp_path / folder.name.replace("mevit", "grocery")
        os.symlink(folder, target)
    server = Server(tmp_path, monkeypatch)
    (answer,) = server.request("grocery", [{"pixel_values": images.numpy()}])
    assert len(outputs_of(answer)[0]) == 8 and {name.split("_")[0] for name, _ in server.asked} == {"grocery"}


def test_the_model_needs_no_onnxruntime(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert server._python_model("mevit").cascade.exit_layers == [2, 3, 4]


def test_the_repository_is_whole_and_its_graphs_are_those_of_the_export(directory):
    repository = directory / "triton"
    graphs = [f"{kind}_{layer}" for kind in ("query", "stage") for layer in (2, 3, 4)]
    assert {folder.name for folder in repository.iterdir()} == {"mevit", *(f"mevit_{graph}" for graph in graphs)}
    for graph in graphs:
        served, exported = repository / f"mevit_{graph}" / "1" / "model.onnx", directory / f"{graph}.onnx"
        assert served.samefile(exported)
    settings = json.loads((directory / "config.json").read_text())
    assert json.loads((repository / "mevit" / "1" / "config.json").read_text()) == settings
    config = parse_pbtxt((repository / "mevit" / "config.pbtxt").read_text())
    assert config == {
        "backend": "python",
        "max_batch_size": MAX_BATCH,
        "input": [{"name": "pixel_values", "data_type": "TYPE_FP32", "dims": [3, 16, 16]}],
        "output": [
            {"name": "logits", "data_type": "TYPE_FP32", "dims": [5]},
            {"name": "exit_layer", "data_type": "TYPE_INT64", "dims": [1]},
        ],
        "dynamic_batching": {},
    }


def test_graphs_are_copied_where_they_cannot_be_linked(directory, tmp_path, monkeypatch):
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in directory.iterdir():
        if file.is_file():
            os.link(file, copied / file.name)

    def fails(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("modeling_mevit.onnx.triton_repository.os.link", fails)
    write_repository(copied)
    served = copied / "triton" / "mevit_stage_2" / "1" / "model.onnx"
    assert served.read_bytes() == (copied / "stage_2.onnx").read_bytes() and not served.samefile(
        copied / "stage_2.onnx"
    )


def test_the_command_line_adds_it_to_a_cascade(mevit, calibrated, tmp_path):
    code, _ = mevit("export", calibrated, tmp_path / "out", "--triton")
    assert "--triton is for the stages of a cascade; add --cascade." in code
    code, _ = mevit("export", calibrated, tmp_path / "out", "--cascade", "--triton")
    assert code == 0 and (tmp_path / "out" / "triton" / "mevit" / "1" / "model.py").is_file()


def test_a_single_exit_has_none(calibrated_model, processor, tmp_path):
    with pytest.raises(ValueError, match="Triton's model repository serves the cascade; export that too."):
        export(calibrated_model, processor, tmp_path / "out", triton=True)
