# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

from training import benchmark


def test_measures_both_ratios(tmp_path):
    output = tmp_path / "benchmark.json"
    options = ["--image_size", "28", "--batch_size", "2", "--pairs", "4", "--output", str(output)]
    results = benchmark.main(options)
    assert json.loads(output.read_text()) == results
    # a tiny batch says nothing of the ratios' size, only that two models of one size were compared
    assert 0.5 < results["time_ratio"] < 3
    assert 0.8 < results["memory_ratio"] < 1.5
    low, high = results["time_ratio_quartiles"]
    assert low <= results["time_ratio"] <= high
