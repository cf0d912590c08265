# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from scipy.stats import binom

import promises
from modeling_mevit.early_exit.calibration import control_expectation, fixed_sequence_test
from modeling_mevit.early_exit.calibration_target import CalibrationTarget
from modeling_mevit.early_exit.predictions import ExitPredictions


pytestmark = pytest.mark.one_major


def test_simulates_every_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(promises, "SIZES", (400,))
    output = tmp_path / "promises.json"
    results = promises.main(["--calibrations", "200", "--output", str(output)])
    assert json.loads(output.read_text()) == results == promises.main(["--calibrations", "200"])
    assert len(results["settings"]) == 4 * 3
    for row in results["settings"]:
        assert all(binom.sf(200 * rate - 1, 200, 0.05) > 0.001 for rate in row["violations"].values()), row
        assert row["saved"]["harm"] <= row["saved"]["difference"], row
        assert row["saved"]["betting"] <= row["saved"]["difference"], row
        # a disagreement is never below a harm, and an expectation is more easily kept than a probability
        assert row["saved"]["disagreement"] <= row["saved"]["harm"] <= row["saved"]["expected harm"], row
        assert row["saved"]["disagreement"] <= row["saved"]["expected disagreement"], row
        error = np.sqrt(row["drop"] / 400 / 200)  # of a mean over 200 calibrations, whose counts vary as Poisson's
        assert all(risk <= row["drop"] + 3 * error for risk in row["risks"].values()), row
    assert max(row["risks"]["expected harm"] / row["drop"] for row in results["settings"]) > 0.95  # and not slack
    printed = capsys.readouterr().out
    assert printed.count("| few harms | 400 |") == 2 * 2 * 3 and '"confidence": 0.95' in printed


@pytest.mark.parametrize(
    ("test", "target"),
    [
        ("difference", CalibrationTarget(max_accuracy_drop=0.02, confidence=0.95, bound="difference")),
        ("disagreement", CalibrationTarget(max_disagreement=0.02, confidence=0.95)),
        ("expected harm", CalibrationTarget(max_accuracy_drop=0.02, guarantee="expectation")),
        ("expected disagreement", CalibrationTarget(max_disagreement=0.02, guarantee="expectation")),
    ],
)
def test_counts_are_those_of_calibrations(test, target):
    """The same images, as predictions of two exits."""
    certify = control_expectation if target.guarantee == "expectation" else fixed_sequence_test
    harms, corrections = promises.draw(
        *promises.MODELS["many corrections"](promises.THRESHOLDS, 0.02), 800, 5, np.random.default_rng(0)
    )
    passed = promises.passes(test, harms, corrections, 800, 0.02).cumprod(1).sum(1)
    for harmed, corrected, expected in zip(harms, corrections, passed, strict=True):
        cells = np.concatenate(
            [np.repeat(np.arange(100), np.diff(counts, prepend=0)) for counts in (harmed, corrected)]
        )
        count = len(cells)
        scores = np.full((800, 2), 0.005, np.float32)
        scores[:count, 0] = (cells + 0.5) / 100
        correct = np.ones((800, 2), np.int64)
        correct[: harmed[-1], 0] = 0
        correct[harmed[-1] : count, 1] = 0
        exits = ExitPredictions([6, 12], np.array([0.5, 1.0]), np.ones(800, np.int64), correct, {"margin": scores})
        found = certify(exits, "margin", [[float(t)] for t in promises.THRESHOLDS], target)[0]
        assert found.thresholds == [promises.THRESHOLDS[expected - 1]]
