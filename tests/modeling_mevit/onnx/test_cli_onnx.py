# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of `mevit` that export, and that run what was exported."""

import json
from pathlib import Path

import pytest


pytest.importorskip("optimum.exporters.onnx", reason="needs the extra mevit[onnx]")


@pytest.fixture
def calibrated(mevit, checkpoint, photos) -> Path:
    code, _ = mevit("calibrate", checkpoint, "--data", photos, "--max-cost", "0.8", "--policy", "confidence")
    assert code == 0
    return checkpoint


@pytest.fixture
def exported(mevit, calibrated, tmp_path) -> Path:
    code, out = mevit("export", calibrated, tmp_path / "out", "--cascade")
    assert code == 0
    for name in ("exit_2.onnx", "exit_3.onnx", "model.onnx", "cascade_mevit.py"):
        assert (tmp_path / "out" / name).is_file()
    assert f"Everything is in {tmp_path / 'out'}; each float32 file gave what PyTorch gives." in out
    return tmp_path / "out"


def test_exports_the_exits_that_are_asked_for(mevit, checkpoint, tmp_path):
    code, _ = mevit("export", checkpoint, tmp_path / "out", "--exits", "2", "4", "--opset", "17")
    assert code == 0
    assert {file.name for file in (tmp_path / "out").glob("*.onnx")} == {"exit_2.onnx", "model.onnx"}


def test_the_exported_cascade_does_what_the_checkpoint_does(mevit, calibrated, exported, photos, tmp_path):
    assert mevit("evaluate", calibrated, "--data", photos, "--output", tmp_path / "measured")[0] == 0
    code, out = mevit("evaluate", exported, "--data", photos)
    assert code == 0 and "40 pictures in ONNX Runtime" in out
    in_torch = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["early_exit"]
    in_onnx = json.loads((exported / "evaluation.json").read_text())
    for name in ("accuracy", "accuracy_of_last_exit", "left_at"):
        assert in_onnx[name] == in_torch[name]
    assert in_onnx["cost"] == pytest.approx(in_torch["cost"])
    assert in_onnx["time"] == pytest.approx(in_onnx["full_pictures_per_second"] / in_onnx["pictures_per_second"])


def test_int8_within_a_point(mevit, calibrated, photos, tmp_path):
    code, out = mevit("export", calibrated, tmp_path / "int8", "--cascade", "--quantize", "int8", "--data", photos)
    assert code == 0 and "exit_2.onnx: accuracy" in out
    report = json.loads((tmp_path / "int8" / "precision.json").read_text())["accuracy"]
    for accuracy in report.values():
        assert accuracy["int8"] >= accuracy["float32"] - 0.01
    assert mevit("evaluate", tmp_path / "int8", "--data", photos)[0] == 0


@pytest.mark.slow
def test_benchmarks(mevit, calibrated, exported, photos, tmp_path):
    command = ["benchmark", calibrated, exported, "--data", photos, "--pictures", "4", "--threads", "1"]
    code, out = mevit(*command, "--output", tmp_path / "benchmark.json")
    assert code == 0 and "| early exit | ONNX Runtime |" in out
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["pictures"] == 4 and results["machine"]["threads"] == 1
    assert len(results["rows"]) == 2 * (1 + 3 + 1)  # plain ViT, three exits, early exit


def test_bad_input_is_named(mevit, checkpoint, exported, photos, tmp_path):
    def message(*arguments) -> str:
        return str(mevit(*arguments)[0])

    output = tmp_path / "new"
    assert "[5]" in message("export", checkpoint, output, "--exits", "5")
    assert "--data" in message("export", checkpoint, output, "--quantize", "int8")
    assert "two precisions" in message("export", checkpoint, output, "--quantize", "int8", "--dtype", "float16")
    assert "is not empty" in message("export", checkpoint, exported)
    assert "opset=30" in message("export", checkpoint, output, "--opset", "30")
    assert "has to be calibrated" in message("benchmark", checkpoint, output, "--data", photos)
    assert "are for checkpoints" in message("evaluate", exported, "--data", photos, "--plain", checkpoint)
    assert "chose the thresholds" in message("evaluate", exported, "--data", photos, "--split", "validation")
    assert not output.exists()
