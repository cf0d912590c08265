# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest


pytest.importorskip("optimum.exporters.onnx", reason="needs the extra mevit[onnx]")

from training import benchmark_early_exit, benchmark_export  # noqa: E402


SHAPE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "exit_layers": [1, 3],
}


@pytest.mark.slow
def test_measures_a_cascade_that_nobody_leaves_and_one_that_all_leave(monkeypatch, tmp_path):
    monkeypatch.setitem(benchmark_early_exit.MODELS, "vit_base_16", SHAPE)
    thresholds = []
    benchmark = benchmark_export.benchmark

    def watched(checkpoint, exported, images, **settings):
        thresholds.append(json.loads((exported / "cascade.json").read_text())["thresholds"])
        assert (
            json.loads((exported.with_name("checkpoint") / "config.json").read_text())["exit_thresholds"]
            == (thresholds[-1])
        )
        return benchmark(checkpoint, exported, images, **settings, memory_processes=1)

    monkeypatch.setattr(benchmark_export, "benchmark", watched)
    output = tmp_path / "results.json"
    arguments = ["--images", "3", "--threads", "1", "--image_size", "24", "--output", str(output)]
    results = benchmark_export.main(arguments)
    assert thresholds == [[0.0], [1.0]] and results["image_size"] == 24
    for rows in results["rows"].values():
        assert {row["name"] for row in rows} == {"plain ViT", "MEViT_1", "MEViT_3", "early exit"}
        assert {row["library"] for row in rows} == {"PyTorch", "ONNX Runtime"}
    assert json.loads(output.read_text())["rows"] == results["rows"]


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="model='vit_huge' is unknown; allowed are"):
        benchmark_export.BenchmarkArguments(model="vit_huge")
