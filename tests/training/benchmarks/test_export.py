# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest


pytest.importorskip("onnxscript", reason="needs the extra mevit[onnx]")

import export
import timing
from tests.helpers.runs import SHAPE


pytestmark = pytest.mark.one_major


@pytest.mark.slow
def test_measures_a_cascade_that_nobody_leaves_and_one_that_all_leave(monkeypatch, tmp_path):
    monkeypatch.setitem(timing.MODELS, "vit_base_16", {**SHAPE, "image_size": 16, "exit_layers": [1, 3]})
    # which takes a fresh process for each, and is tested where it is
    monkeypatch.setattr("modeling_mevit.onnx.benchmark._peak_memory", lambda *args: 100.0)
    asked = []
    monkeypatch.setattr(export, "peak_memory", lambda script, *options: asked.append(options) or 3.0)
    thresholds = []
    benchmark = export.benchmark

    def watched(checkpoint, exported, images, **settings):
        configs = [exported / "config.json", exported.with_name("checkpoint") / "config.json"]
        thresholds.append([json.loads(config.read_text())["exit_thresholds"] for config in configs])
        return benchmark(checkpoint, exported, images, **settings)

    monkeypatch.setattr(export, "benchmark", watched)
    output = tmp_path / "results.json"
    arguments = ["--images", "3", "--threads", "1", "--image_size", "24", "--output", str(output)]
    results = export.main(arguments)
    assert thresholds == [[[0.0], [0.0]], [[1.0], [1.0]]]
    assert results["image_size"] == 24 and results["num_samples"] == 3
    assert asked == [("--model=vit_base_16", "--num_labels=200", "--image_size=24", "--only_export=True")]
    assert results["export_memory"] > 3.0  # of weights that take less than a MiB
    for rows in results["rows"].values():
        assert {row["name"] for row in rows} == {"plain ViT", "MEViT_1", "MEViT_3", "early exit"}
        assert {row["library"] for row in rows} == {"PyTorch", "ONNX Runtime"}
    assert json.loads(output.read_text())["rows"] == results["rows"]


@pytest.mark.slow
def test_tells_what_an_export_takes_in_this_process(monkeypatch, capsys):
    monkeypatch.setitem(timing.MODELS, "vit_base_16", {**SHAPE, "image_size": 16, "exit_layers": [1, 3]})
    taken = iter([100.0, 130.0])
    monkeypatch.setattr(export, "rss_mib", lambda: next(taken))
    monkeypatch.setattr(export, "peak_rss_mib", lambda: next(taken))
    assert export.main(["--image_size", "24", "--only_export", "True"]) == {}
    assert capsys.readouterr().out.split()[-1] == "30.0"


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="model must be one of .*, got 'vit_huge'"):
        export.ExportBenchmarkArguments(model="vit_huge")
