# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

from training import benchmark


def test_measures_both_ratios(tmp_path):
    output = tmp_path / "benchmark.json"
    options = ["--image_size", "28", "--batch_size", "2", "--pairs", "4", "--output", str(output)]
    results = benchmark.main(options)
    assert json.loads(output.read_text()) == results
    low, high = results["time_ratio_quartiles"]
    assert low <= results["time_ratio"] <= high
    assert results["plain_peak_mib"] > 50
