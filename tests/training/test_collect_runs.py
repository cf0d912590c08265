# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from training import collect


def write_run(directory, accuracies, seconds=120.0, test=True, **recipe) -> str:
    exits = [
        {"exit": layer, "validation_accuracy": accuracy, **({"test_accuracy": accuracy / 2} if test else {})}
        for layer, accuracy in zip((6, 12), accuracies, strict=True)
    ]
    directory.mkdir()
    content = {"exits": exits, "training_seconds": seconds, "recipe": {"seed": 0, "optim": "sgd", **recipe}}
    (directory / "metrics.json").write_text(json.dumps(content))
    return str(directory)


def test_runs_are_added_and_replaced_and_differences_shown(tmp_path):
    first = write_run(tmp_path / "b", (0.5, 0.6))
    second = write_run(tmp_path / "a", (0.7, 0.8), seconds=None, test=False, learning_rate=0.001)
    table = tmp_path / "table"
    collect.main([str(table), "--runs", first])
    runs = collect.main([str(table), "--runs", second])
    assert [run["run"] for run in runs] == ["a", "b"] and json.loads((table / "runs.json").read_text()) == runs
    lines = (table / "runs.md").read_text().splitlines()
    assert lines[0] == (
        "| run | learning_rate | validation, first exit (%) | validation, last exit (%) | test, first exit (%) "
        "| test, last exit (%) | minutes |"
    )
    assert lines[2:] == ["| a | 0.001 | 70.0 | 80.0 | – | – | – |", "| b | – | 50.0 | 60.0 | 25.0 | 30.0 | 2 |"]
    (tmp_path / "new").mkdir()
    replaced = write_run(tmp_path / "new" / "b", (0.9, 1.0))
    assert collect.main([str(table), "--runs", replaced])[1]["exits"][0]["validation_accuracy"] == 0.9


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no output directory of a finished run"):
        collect.main([str(tmp_path), "--runs", str(tmp_path / "none")])


def test_runs_of_the_same_name_are_refused(tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "mevit").mkdir()
    runs = [write_run(tmp_path / name / "seed0", (0.5, 0.6)) for name in ("vit", "mevit")]
    with pytest.raises(ValueError, match="have directories of the same name"):
        collect.main([str(tmp_path / "table"), "--runs", *runs])
