# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest

import collect_runs
from tests.helpers.runs import write_metrics


pytestmark = pytest.mark.one_major


def test_runs_are_added_and_replaced_and_differences_shown(tmp_path):
    first = write_metrics(tmp_path / "b", (0.5, 0.6))
    second = write_metrics(tmp_path / "a", (0.7, 0.8), seconds=None, test=False, model_config={"patch_size": 14})
    table = tmp_path / "table"
    collect_runs.main([str(table), "--runs", first])
    runs = collect_runs.main([str(table), "--runs", second])
    assert [run["run"] for run in runs] == ["a", "b"] and json.loads((table / "runs.json").read_text()) == runs
    lines = (table / "runs.md").read_text().splitlines()
    assert lines[0] == (
        "| run | model_config | validation, first exit (%) | validation, last exit (%) | test, first exit (%) "
        "| test, last exit (%) | minutes |"
    )
    assert lines[2:] == [
        '| a | {"patch_size": 14} | 70.0 | 80.0 | – | – | – |',
        "| b | – | 50.0 | 60.0 | 25.0 | 30.0 | 2 |",
    ]
    replaced = write_metrics(tmp_path / "new" / "b", (0.9, 1.0))
    assert collect_runs.main([str(table), "--runs", replaced])[1]["exits"][0]["validation_accuracy"] == 0.9


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match="a run must be the output directory of a finished run, .* got .*none"):
        collect_runs.main([str(tmp_path), "--runs", str(tmp_path / "none")])


def test_runs_of_the_same_name_are_refused(tmp_path):
    runs = [write_metrics(tmp_path / name / "seed0", (0.5, 0.6)) for name in ("vit", "mevit")]
    with pytest.raises(ValueError, match="must be directories of different names"):
        collect_runs.main([str(tmp_path / "table"), "--runs", *runs])
