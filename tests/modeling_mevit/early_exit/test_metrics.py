# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from modeling_mevit.early_exit.calibration import shared_thresholds
from modeling_mevit.early_exit.metrics import area_under, auroc_per_exit, oracle_curve, shared_threshold_curve
from modeling_mevit.early_exit.predictions import ExitPredictions


pytestmark = pytest.mark.one_major


def test_auroc_by_hand():
    scores = np.array([[0.9, 0.1], [0.2, 0.2], [0.5, 0.3], [0.5, 0.4]])
    correct = np.array([[False, True], [True, True], [True, True], [False, True]])
    first, second = auroc_per_exit(scores, correct)
    # errors 0.9 and 0.5 against right answers 0.2 and 0.5: three of four pairs are in order, and one is a tie
    assert first == 3.5 / 4
    assert math.isnan(second)


def random_exits(samples: int = 60, exits: int = 4):
    rng = np.random.default_rng(0)
    correct = rng.random((samples, exits)) < np.linspace(0.5, 0.8, exits)
    scores = np.clip(rng.random((samples, exits)) - 0.3 * correct, 0, 1).round(2)  # with ties
    return scores, correct, np.linspace(0.4, 1.0, exits)


def test_the_curve_is_that_of_all_thresholds():
    scores, correct, costs = random_exits()
    exits = ExitPredictions([1, 2, 3, 4], costs, np.ones(60, dtype=int), correct.astype(np.int64), {"margin": scores})
    points = [exits.simulate("margin", thresholds) for thresholds in shared_thresholds(exits, "margin")]
    expected = sorted({(round(point.cost, 9), round(point.accuracy, 9)) for point in points})
    given = sorted(
        {(round(c, 9), round(a, 9)) for c, a in zip(*shared_threshold_curve(scores, correct, costs), strict=True)}
    )
    assert given == expected and len(given) > 20


def test_area_by_hand():
    costs = np.array([0.5, 1.0])
    scores, correct = np.array([[0.1, 0], [0.9, 0]]), np.array([[True, True], [False, True]])
    # (0.5, 0.5) → (0.75, 1.0) → (1.0, 1.0): mean heights 0.75 and 1
    assert area_under(*shared_threshold_curve(scores, correct, costs), costs) == pytest.approx(0.875)
    assert area_under(*oracle_curve(correct, costs), costs) == pytest.approx(0.875)
    # a single exit has no range of costs
    one = shared_threshold_curve(scores[:, :1], correct[:, :1], costs[:1])
    assert area_under(*one, costs[:1]) == 0.5


def test_no_policy_beats_the_oracle():
    scores, correct, costs = random_exits()
    area = area_under(*shared_threshold_curve(scores, correct, costs), costs)
    cost, accuracy = oracle_curve(correct, costs)
    assert 0.5 < area < area_under(cost, accuracy, costs) < 1
    assert accuracy[-1] == correct.any(1).mean() and accuracy[0] == correct[:, 0].mean()
    assert np.all(np.diff(cost) >= 0)
