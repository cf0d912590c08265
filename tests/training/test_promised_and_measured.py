# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

import promised_and_measured
import train
from modeling_mevit import CalibrationTarget
from modeling_mevit.early_exit.predictions import ExitPredictions
from promised_and_measured import Measurement, Pair, measure, table_of
from tests.helpers.images import write_colours
from tests.helpers.runs import config_file


pytestmark = pytest.mark.one_major

DROP = CalibrationTarget(max_accuracy_drop=0.02, confidence=0.95)
DISAGREEMENT = CalibrationTarget(max_disagreement=0.02, confidence=0.95)


def predictions(num_images: int, num_harmed: int) -> ExitPredictions:
    """Two exits of costs 0.4 and 1. The first is sure of all images and wrong on `num_harmed`; the last is right."""
    labels = np.zeros(num_images, dtype=np.int64)
    first = (np.arange(num_images) < num_harmed).astype(np.int64)
    scores = np.full((num_images, 2), 0.1, dtype=np.float32)
    return ExitPredictions([1, 2], np.array([0.4, 1.0]), labels, np.stack([first, labels], 1), {"confidence": scores})


def pairs(*harmed: int) -> list[Pair]:
    """Two halves, of which so many images are harmed, both ways round."""
    first, second = (predictions(400, number) for number in harmed)
    return [Pair("first", first, second, plain_accuracy=0.9), Pair("second", second, first, plain_accuracy=0.9)]


def test_each_half_is_measured_with_the_thresholds_of_the_other():
    of_first, of_second = measure("seed0", pairs(0, 40), DROP, "confidence", num_labels=5)
    assert (of_first.calibrated_on, of_second.calibrated_on) == ("first", "second")
    # no harm of 400 certifies 2 %, with which all images leave, and 40 of the other half are harmed
    assert of_first.measured.exit_counts == {1: 400, 2: 0}
    assert of_first.lost == pytest.approx(0.1)
    assert of_second.measured is None and of_second.lost == 0


def test_the_table_has_means_over_what_was_certified_and_counts_broken_promises():
    rows = [one for target in (DROP, DISAGREEMENT) for one in measure("seed0", pairs(0, 40), target, "confidence", 5)]
    of_drop, of_disagreement = table_of(rows).splitlines()[2:]
    assert of_drop == (
        "| a drop of at most 2.00% with probability 95%, harm | 1 of 2 | 90.0 | +0.0 | +10.0 | 10.0 | 0.400 | 1 |"
    )
    assert of_disagreement.startswith("| a disagreement of at most 2.00% with probability 95% | 1 of 2 | 90.0 |")


def test_nothing_certified_has_no_means():
    rows = measure("seed0", pairs(40, 40), DROP, "confidence", 5)
    assert table_of(rows).splitlines()[-1].endswith("| 0 of 2 | – | – | – | – | – | 0 |")


@pytest.mark.slow
def test_runs_of_the_training_script(tmp_path, capsys):
    write_colours(tmp_path / "colours", deviation=250, shape=(22, 26))
    for name, exits in (("mevit", [1, 2, 3]), ("vit", [3])):
        settings = {"exit_layers": exits, "num_train_epochs": 1, "dataset": str(tmp_path / "colours")}
        train.main([config_file(tmp_path, **settings), "--output_dir", str(tmp_path / name)])
    options = ["--runs", str(tmp_path / "mevit"), "--plain", str(tmp_path / "vit")]
    results = promised_and_measured.main(
        [*options, "--data", str(tmp_path / "colours"), "--output", str(tmp_path / "promises.json")]
    )
    assert len(results) == 2 * len(promised_and_measured.TARGETS)
    assert all(isinstance(one, Measurement) and one.run == "mevit" for one in results)
    written = json.loads((tmp_path / "promises.json").read_text())["results"]
    assert [one["target"] for one in written] == [one.target.to_dict() for one in results]
    assert "| promised | certified |" in capsys.readouterr().out
    by_validation = promised_and_measured.main(
        [*options, "--data", str(tmp_path / "colours"), "--calibrate_on", "validation"]
    )
    assert {one.calibrated_on for one in by_validation} == {"validation"} and 2 * len(by_validation) == len(results)
    with pytest.raises(ValueError, match="plain must have as many runs as runs, 1, got 2"):
        promised_and_measured.main(["--runs", "a", "--plain", "b", "c", "--data", "d"])
