# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from modeling_mevit.early_exit.calibration import shared_thresholds
from modeling_mevit.early_exit.predictions import ExitPredictions
from modeling_mevit.early_exit.metrics import AccuracyCostArea, ErrorDetection, ExitAccuracy, oracle_curve, shared_threshold_curve


def test_accuracy_of_each_exit():
    predictions = np.array([[1, 2], [0, 0], [3, 3], [1, 1]])
    metrics = ExitAccuracy().compute(predictions=predictions, references=np.array([2, 0, 3, 0]), exit_layers=[6, 12])
    assert metrics == {"accuracy": 0.75, "accuracy/exit_6": 0.5, "accuracy/exit_12": 0.75}


def test_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert ExitAccuracy().compute(predictions=[[1]], references=[1], exit_layers=[12])["accuracy"] == 1


def test_error_detection_by_hand():
    scores = np.array([[0.9, 0.1], [0.2, 0.2], [0.5, 0.3], [0.5, 0.4]])
    right = np.array([[False, True], [True, True], [True, True], [False, True]])
    metrics = ErrorDetection().compute(predictions=scores, references=right, exit_layers=[6, 12])
    # errors 0.9 and 0.5 against right answers 0.2 and 0.5: three of four pairs are in order, and one is a tie
    assert metrics["auroc/exit_6"] == 3.5 / 4
    assert math.isnan(metrics["auroc/exit_12"]) and metrics["auroc"] == 3.5 / 4
    alone = ErrorDetection().compute(predictions=scores[:, 1:], references=right[:, 1:], exit_layers=[12])
    assert math.isnan(alone["auroc"])


def random_exits(samples: int = 60, exits: int = 4):
    rng = np.random.default_rng(0)
    right = rng.random((samples, exits)) < np.linspace(0.5, 0.8, exits)
    scores = np.clip(rng.random((samples, exits)) - 0.3 * right, 0, 1).round(2)  # with ties
    return scores, right, np.linspace(0.4, 1.0, exits)


def test_the_curve_is_that_of_all_thresholds():
    scores, right, costs = random_exits()
    record = ExitPredictions([1, 2, 3, 4], costs, np.ones(60, dtype=int), right.astype(np.int64), {"margin": scores})
    runs = [record.outcome(record.places("margin", setting)) for setting in shared_thresholds(record, "margin")]
    expected = sorted({(round(run.cost, 9), round(run.accuracy, 9)) for run in runs})
    given = sorted(
        {(round(c, 9), round(a, 9)) for c, a in zip(*shared_threshold_curve(scores, right, costs), strict=True)}
    )
    assert given == expected and len(given) > 20


def test_area_by_hand():
    costs = [0.5, 1.0]
    scores, right = np.array([[0.1, 0], [0.9, 0]]), np.array([[True, True], [False, True]])
    metrics = AccuracyCostArea().compute(predictions=scores, references=right, costs=costs)
    # (0.5, 0.5) → (0.75, 1.0) → (1.0, 1.0): mean heights 0.75 and 1
    assert metrics == {"area": pytest.approx(0.875), "oracle": pytest.approx(0.875)}


def test_no_policy_beats_the_oracle():
    scores, right, costs = random_exits()
    area = AccuracyCostArea().compute(predictions=scores, references=right, costs=costs.tolist())
    assert 0.5 < area["area"] < area["oracle"] < 1
    cost, accuracy = oracle_curve(right, costs)
    assert accuracy[-1] == right.any(1).mean() and accuracy[0] == right[:, 0].mean()
    assert np.all(np.diff(cost) >= 0)
