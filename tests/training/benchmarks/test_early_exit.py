# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from training import benchmark_early_exit as benchmark


TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("images", [3, 8, 32])
def test_thresholds_let_the_same_number_leave_at_each_exit(images):
    scores = torch.rand(images, 3, generator=torch.Generator().manual_seed(0))
    thresholds = torch.tensor(benchmark.thresholds_that_spread(scores))
    place = torch.cat((scores[:, :-1] < thresholds, torch.ones(images, 1).bool()), dim=1).int().argmax(1)
    counts = place.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


def test_measures_all_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.MODELS, "tiny", TINY)
    monkeypatch.setattr(benchmark, "peak_memory", lambda kind, name, arguments: 100.0)
    output = tmp_path / "times.json"
    options = ["--models", "tiny", "--batch_sizes", "1", "4", "--pairs", "4", "--num_labels", "5"]
    results = benchmark.main([*options, "--output", str(output)])
    assert json.loads(output.read_text()) == results
    for batch in (1, 4):
        measured = results[f"tiny/batch_{batch}"]
        assert set(measured) == {"fixed_exit", "never_taken", "spread_evenly"}
        assert all(low <= ratio["time"] <= high for ratio in measured.values() for low, high in [ratio["quartiles"]])
        spread = measured["spread_evenly"]
        assert 0.3 < spread["cost"] < 1 and spread["time_by_cost"] == spread["time"] / spread["cost"]
    assert results["tiny/memory"] == 1
    assert "tiny, batch 4: fixed_exit" in capsys.readouterr().out


@pytest.mark.parametrize("only", ["plain", "early_exit"])
def test_prints_the_memory_of_one_kind(monkeypatch, capsys, only):
    monkeypatch.setitem(benchmark.MODELS, "tiny", TINY)
    assert benchmark.main(["--models", "tiny", "--batch_sizes", "4", "--only", only]) == {}
    assert float(capsys.readouterr().out) > 10


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"models=\['vit_huge'\] are unknown"):
        benchmark.main(["--models", "vit_huge"])
