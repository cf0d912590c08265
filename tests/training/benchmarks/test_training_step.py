# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json
from statistics import median

import pytest

import training_step


pytestmark = pytest.mark.one_major


OPTIONS = ["--image_size", "28", "--batch_size", "2", "--pairs", "4"]


@pytest.mark.slow
def test_measures_both_ratios(tmp_path, monkeypatch):
    peaks = {"--only=vit": 200.0, "--only=mevit": 260.0}
    monkeypatch.setattr(training_step, "peak_memory", lambda script, *options: peaks[options[-1]])
    times = []
    in_turn = training_step.times_in_turn
    monkeypatch.setattr(training_step, "times_in_turn", lambda *args: times.append(in_turn(*args)) or times[-1])
    output = tmp_path / "training_step.json"
    results = training_step.main([*OPTIONS, "--output", str(output)])
    assert json.loads(output.read_text()) == results
    (seconds,) = times
    ratios = [ours / plain for ours, plain in zip(seconds["mevit"], seconds["vit"], strict=True)]
    assert len(ratios) == 4 and results["relative_step_time"] == median(ratios)
    assert results["relative_memory"] == 1.3 and results["plain_peak_mib"] == 200


@pytest.mark.parametrize("kind", ["vit", "mevit"])
def test_prints_the_memory_of_one_kind(monkeypatch, capsys, kind):
    monkeypatch.setattr(training_step, "peak_rss_mib", lambda: 123.5)
    assert training_step.main([*OPTIONS, "--only", kind]) == {}
    assert capsys.readouterr().out.split()[-1] == "123.5"


def test_a_step_updates_every_weight():
    arguments = training_step.TrainingStepBenchmarkArguments(image_size=28, batch_size=2)
    steps = training_step.Steps("mevit", arguments)
    before = {name: parameter.clone() for name, parameter in steps.trainer.model.named_parameters()}
    steps.take()
    assert steps.trainer.state.global_step == 1
    changed = {name for name, parameter in steps.trainer.model.named_parameters() if not parameter.equal(before[name])}
    assert {"vit.embeddings.cls_token", "exits.6.classifier.weight", "exits.12.classifier.weight"} <= changed
