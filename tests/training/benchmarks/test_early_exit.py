# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

import early_exit
from tests.helpers.models import TINY


pytestmark = pytest.mark.one_major


SHAPE = {name: value for name, value in TINY.items() if name not in ("num_labels", "exit_layers")}


@pytest.mark.parametrize("images", [3, 8, 32])
def test_thresholds_let_the_same_number_leave_at_each_exit(images):
    scores = torch.rand(images, 3, generator=torch.Generator().manual_seed(0))
    thresholds = torch.tensor(early_exit.thresholds_that_spread(scores))
    place = torch.cat((scores[:, :-1] < thresholds, torch.ones(images, 1).bool()), dim=1).int().argmax(1)
    counts = place.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


@pytest.mark.slow
def test_measures_all_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(early_exit.MODELS, "tiny", SHAPE)
    memory = {"plain": 100.0, "early_exit": 125.0}
    monkeypatch.setattr(early_exit, "memory_of", lambda kind, name, arguments: memory[kind])
    output = tmp_path / "times.json"
    options = ["--models", "tiny", "--batch_sizes", "1", "4", "--pairs", "4", "--num_labels", "5"]
    results = early_exit.main([*options, "--output", str(output)])
    assert json.loads(output.read_text()) == results
    for batch in (1, 4):
        measured = results[f"tiny/batch_{batch}"]
        assert set(measured) == {"fixed_exit", "never_taken", "computed_in_vain", "spread_evenly"}
        spread = measured["spread_evenly"]
        assert 0.3 < spread["cost"] < 1
        assert spread["relative_latency_by_cost"] == spread["relative_latency"] / spread["cost"]
    assert results["tiny/memory"] == 1.25
    assert "tiny, batch 4: fixed_exit" in capsys.readouterr().out


@pytest.mark.slow
def test_bfloat16_is_measured_by_the_plain_vit_in_both_precisions(monkeypatch):
    monkeypatch.setitem(early_exit.MODELS, "tiny", SHAPE)
    monkeypatch.setattr(early_exit, "memory_of", lambda *args: 1.0)
    seen, ratio_of = [], early_exit.ratio_of

    def watched(ours, plain, pairs):
        outputs = [run()[0] if isinstance(run(), list) else run() for run in (ours, plain)]
        seen.append([output.logits.dtype for output in outputs if hasattr(output, "logits")])
        return ratio_of(ours, plain, pairs)

    monkeypatch.setattr(early_exit, "ratio_of", watched)
    options = ["--models", "tiny", "--batch_sizes", "2", "--pairs", "2", "--num_labels", "5", "--dtype", "bfloat16"]
    results = early_exit.main(options)
    assert list(results["tiny/batch_2"]) == [
        "fixed_exit",
        "never_taken",
        "computed_in_vain",
        "fixed_exit_by_float32",
        "spread_evenly",
    ]
    assert seen[:3] == [[torch.bfloat16] * 2] * 3 and seen[3] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("only", ["plain", "early_exit"])
def test_prints_the_memory_of_one_kind(monkeypatch, capsys, only):
    monkeypatch.setitem(early_exit.MODELS, "tiny", SHAPE)
    monkeypatch.setattr(early_exit, "peak_rss_mib", lambda: 123.5)
    assert early_exit.main(["--models", "tiny", "--batch_sizes", "4", "--only", only]) == {}
    assert float(capsys.readouterr().out) == 123.5


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match=r"dtype must be one of \['float32', 'bfloat16'\], got 'int4'"):
        early_exit.main(["--dtype", "int4"])


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"models must be of .*, got \['vit_huge'\]"):
        early_exit.main(["--models", "vit_huge"])
