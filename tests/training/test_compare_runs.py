# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

import compare_runs
from tests.helpers.runs import write_predictions


pytestmark = pytest.mark.one_major


def test_accuracies_and_differences_by_hand(tmp_path, capsys):
    labels = [0, 1, 2, 3]
    baseline = write_predictions(tmp_path / "vit", labels, [[0], [1], [0], [0]], [12])  # 2 of 4
    seeds = [
        write_predictions(tmp_path / "seed_0", labels, [[0, 0], [1, 1], [2, 2], [0, 3]], [6, 12]),  # 3 and 4 of 4
        write_predictions(tmp_path / "seed_1", labels, [[0, 0], [1, 1], [0, 0], [0, 0]], [6, 12]),  # 2 and 2 of 4
    ]
    rows = compare_runs.main(["--baseline", baseline, "--runs", *seeds])
    assert [row["accuracy"] for row in rows] == [0.625, 0.75]
    assert [row["difference"] for row in rows] == [0.125, 0.25]
    assert rows[0]["std"] == pytest.approx(np.std([0.75, 0.5], ddof=1))
    assert rows[0]["interval"][0] == 0 < rows[0]["interval"][1]
    table = capsys.readouterr().out
    assert "baseline: 50.0\n" in table
    assert "| 6 | 62.5 ± 17.7 | +12.5 |" in table


def test_interval_of_a_mean_is_about_two_standard_errors_wide():
    difference = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], p=[0.05, 0.87, 0.08], size=2485)
    low, high = compare_runs.paired_interval(difference, resamples=2000)
    error = 1.96 * difference.std() / np.sqrt(len(difference))
    assert low == pytest.approx(difference.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(difference.mean() + error, abs=0.1 * error)
    assert compare_runs.paired_interval(difference, resamples=2000) == (low, high)
    assert compare_runs.paired_interval(np.zeros(5), resamples=10) == (0, 0)


def test_models_measured_on_other_images_are_not_compared(tmp_path):
    baseline = write_predictions(tmp_path / "vit", [0, 1], [[0], [1]], [12])
    other = write_predictions(tmp_path / "mevit", [1, 1], [[0], [1]], [12])
    with pytest.raises(ValueError, match="must be measured on the same images as"):
        compare_runs.main(["--baseline", baseline, "--runs", other])
    with pytest.raises(ValueError, match="must have the same labels as"):
        compare_runs.main(["--baseline", baseline, other, "--runs", baseline])


def test_a_recipe_is_chosen_without_the_test_images(tmp_path):
    for split, prediction in {"test": 0, "validation": 1}.items():
        runs = [write_predictions(tmp_path / name, [1], [[prediction]], [12], split) for name in ("vit", "mevit")]
    comparison = ["--baseline", runs[0], "--runs", runs[1]]
    assert compare_runs.main(comparison)[0]["accuracy"] == 0
    assert compare_runs.main([*comparison, "--split", "validation"])[0]["accuracy"] == 1
    with pytest.raises(ValueError, match="split must be 'test' or 'validation', got 'train'"):
        compare_runs.main([*comparison, "--split", "train"])
