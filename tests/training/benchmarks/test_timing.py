# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest

import timing


pytestmark = pytest.mark.one_major


def test_runs_take_turns_every_other_round_in_reverse(monkeypatch):
    order, clock = [], [0.0]

    def run(name: str, seconds: float):
        order.append(name)
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seconds = timing.times_in_turn({"a": lambda: run("a", 1.0), "b": lambda: run("b", 2.0)}, rounds=3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba" + "ab"
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}  # two rounds warm up


def test_the_median_ratio_is_of_times_in_the_same_round():
    measured = timing.median_ratio([1.0, 4.0, 9.0, 16.0, 25.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert measured == {"relative_latency": 3.0, "quartiles": [2.0, 4.0]}


def test_peak_memory_is_what_a_fresh_process_prints_last(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint('something')\nprint(os.environ['MALLOC_MMAP_THRESHOLD_'], sys.argv[1])\n")
    assert timing.peak_memory(str(script), "12.5") == 12.5


@pytest.mark.parametrize(("image_size", "expected"), [(None, 112), (56, 56)])
def test_makes_models_for_any_image_size(monkeypatch, image_size, expected):
    shape = {"image_size": 112, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    monkeypatch.setitem(timing.MODELS, "tiny", shape)
    model = timing.make_model("tiny", 5, image_size)
    assert (model.config.image_size, model.config.num_labels, model.training) == (expected, 5, False)
