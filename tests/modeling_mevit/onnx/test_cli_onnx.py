# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of `mevit` that export, and that run what was exported."""

import json
import warnings
from pathlib import Path

import pytest

from modeling_mevit.early_exit.calibration import CalibrationResult
from modeling_mevit.early_exit.calibration_target import CalibrationTarget
from modeling_mevit.onnx.quantize import host_target
from tests.helpers.openvino_here import needs_bfloat16, needs_openvino


pytestmark = pytest.mark.one_major


@pytest.fixture
def exported(mevit, calibrated, tmp_path) -> Path:
    code, out = mevit("export", calibrated, tmp_path / "out", "--exits", "2,3,4", "--cascade")
    assert code == 0
    for name in ("exit_2.onnx", "exit_3.onnx", "model.onnx", "cascade_mevit.py"):
        assert (tmp_path / "out" / name).is_file()
    assert f"Everything is in {tmp_path / 'out'}; each float32 file gave what PyTorch gives." in out
    return tmp_path / "out"


def test_exports_the_exits_that_are_asked_for(mevit, checkpoint, tmp_path):
    code, _ = mevit("export", checkpoint, tmp_path / "out", "--exits", "2,4")
    assert code == 0
    assert {file.name for file in (tmp_path / "out").glob("*.onnx")} == {"exit_2.onnx", "model.onnx"}


def test_the_exported_cascade_does_what_the_checkpoint_does(mevit, calibrated, exported, photos, tmp_path):
    assert mevit("evaluate", calibrated, "--data", photos, "--output", tmp_path / "measured")[0] == 0
    code, out = mevit("evaluate", exported, "--data", photos)
    assert code == 0 and "model.onnx" in out
    in_torch = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    in_onnx = json.loads((exported / "evaluation.json").read_text())
    assert in_onnx["early_exit"]["operating_point"] == in_torch["early_exit"]["operating_point"]
    assert in_onnx["exits"] == in_torch["exits"]
    assert in_onnx["policies"]["confidence"]["area"] == pytest.approx(in_torch["policies"]["confidence"]["area"])
    assert (in_onnx["early_exit"]["reference"], in_torch["early_exit"]["reference"]) == ("model.onnx", "plain ViT")
    files = [photos / "test" / name / "0.png" for name in ("crimson", "teal")]
    assert mevit("predict", exported, *files)[1] == mevit("predict", calibrated, *files)[1]


def test_int8_and_its_evaluation(mevit, calibrated, photos, tmp_path):
    code, out = mevit("export", calibrated, tmp_path / "int8", "--cascade", "--precision", "int8", "--data", photos)
    assert code == 0 and "model.onnx: accuracy" in out and f"in int8, made for {host_target()}" in out
    report = json.loads((tmp_path / "int8" / "precision.json").read_text())["accuracy"]
    for accuracy in report.values():
        assert accuracy["int8"] >= accuracy["float32"] - 0.01
    assert mevit("evaluate", tmp_path / "int8", "--data", photos)[0] == 0


@needs_bfloat16
def test_bfloat16_and_its_evaluation(mevit, calibrated, photos, tmp_path):
    in_bfloat16 = ["--max-cost", "0.9", "--dtype", "bfloat16", "--output", tmp_path / "half"]
    assert mevit("calibrate", calibrated, "--data", photos, *in_bfloat16)[0] == 0
    command = ["export", tmp_path / "half", tmp_path / "out", "--cascade", "--precision", "bfloat16", "--data", photos]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="exit_thresholds were chosen in")  # they are chosen anew
        code, out = mevit(*command)
    assert code == 0 and "model.onnx: accuracy" in out and " in float32, " in out and " in bfloat16" in out
    code, out = mevit("evaluate", tmp_path / "out", "--data", photos)
    assert code == 0 and " images, in bfloat16" in out
    evaluated = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluated["precision"] == "bfloat16" and evaluated["early_exit"]["operating_point"]["accuracy"] > 0.9
    file = photos / "test" / "teal" / "0.png"
    assert "teal" in mevit("predict", tmp_path / "out", file)[1]
    with pytest.warns(UserWarning, match="were chosen in bfloat16, got float32"):
        assert "teal" in mevit("predict", tmp_path / "out", file, "--dtype", "float32")[1]


@needs_openvino
def test_openvino_evaluates_an_export_in_float32(mevit, exported, photos, tmp_path):
    openvino = ["--backend", "openvino", "--dtype", "float32"]
    for name, options in (("by_onnxruntime", []), ("by_openvino", openvino)):
        assert mevit("evaluate", exported, "--data", photos, *options, "--output", tmp_path / name)[0] == 0
    by_onnxruntime, by_openvino = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("by_onnxruntime", "by_openvino")
    )
    assert by_openvino["precision"] == by_onnxruntime["precision"] == "float32"
    assert by_openvino["exits"] == by_onnxruntime["exits"]
    assert by_openvino["early_exit"]["operating_point"] == by_onnxruntime["early_exit"]["operating_point"]


def test_a_certificate_that_int8_cannot_keep_is_told(mevit, checkpoint, photos, tmp_path, monkeypatch):
    target = ["--max-accuracy-drop", "0.3", "--confidence", "0.6", "--policy", "confidence"]
    calibrate = ["calibrate", checkpoint, "--data", photos, "--split", "test", "--half", "first"]
    assert mevit(*calibrate, *target)[0] == 0
    export = ["export", checkpoint, "--cascade", "--precision", "int8-dynamic", "--data", photos]
    assert "it can certify nothing" in str(mevit(*export, tmp_path / "no", "--split", "train")[0])
    code, out = mevit(*export, tmp_path / "kept")
    assert code == 0 and "Certified on 20 images" in out
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    data = config["calibration"]["data"]
    assert (data["split"], data["half"]) == ("test", "first")  # those that calibrated the checkpoint

    nothing = CalibrationResult(CalibrationTarget(max_accuracy_drop=0.3, confidence=0.6), None)
    monkeypatch.setattr("modeling_mevit.onnx.quantize.calibrate", lambda *args, **kwargs: nothing)
    code, out = mevit(*export, tmp_path / "refused")
    assert code == 1 and "No thresholds that save cost can be certified" in out and "Early exit is off" in out
    assert json.loads((tmp_path / "refused" / "config.json").read_text())["early_exit"] is False
    assert mevit("evaluate", tmp_path / "refused", "--data", photos)[0] == 0
    assert json.loads((tmp_path / "refused" / "evaluation.json").read_text())["early_exit"] is None


@pytest.mark.slow
def test_benchmarks(mevit, calibrated, exported, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_mevit.onnx.benchmark.MEMORY_PROCESSES", 1)  # each takes seconds to start
    command = ["benchmark", calibrated, exported, "--data", photos, "--images", "4", "--threads", "1"]
    code, out = mevit(*command, "--output", tmp_path / "benchmark.json")
    assert code == 0 and "| early exit | ONNX Runtime |" in out
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["num_samples"] == 4 and results["environment"]["threads"] == 1
    assert len(results["rows"]) == 2 * (1 + 3 + 1)  # plain ViT, three exits, early exit


def test_bad_input_is_named(mevit, checkpoint, exported, photos, tmp_path):
    def message(*arguments) -> str:
        return str(mevit(*arguments)[0])

    output = tmp_path / "new"
    assert "[5]" in message("export", checkpoint, output, "--exits", "5")
    assert "--data" in message("export", checkpoint, output, "--precision", "int8")
    float16 = ["--precision", "float16", "--data", photos, "--target", "arm64"]
    assert "target must be left out with float16" in message("export", checkpoint, output, *float16)
    assert "is not empty" in message("export", checkpoint, exported)
    assert "must be calibrated" in message("benchmark", checkpoint, output, "--data", photos)
    assert "--exits must be layer numbers" in message("export", checkpoint, output, "--exits", "2,x")
    assert "is for checkpoints" in message("evaluate", exported, "--data", photos, "--device", "cuda")
    assert "precision is chosen for OpenVINO" in message("evaluate", exported, "--data", photos, "--dtype", "float32")
    assert "is for exports" in message("evaluate", checkpoint, "--data", photos, "--backend", "openvino")
    assert "chose the thresholds" in message("evaluate", exported, "--data", photos, "--split", "validation")
    assert not output.exists()
