# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from exit_subsets import Costs, Outcome, fastest, outcome, subsets_of
from modeling_mevit import CalibrationTarget
from modeling_mevit.early_exit.predictions import ExitPredictions


pytestmark = pytest.mark.one_major


def test_every_subset_of_the_early_exits_ends_in_the_last_one():
    assert subsets_of([6, 9, 12]) == [(6, 12), (9, 12), (6, 9, 12)]


def test_an_image_pays_for_the_exits_before_its_own_that_are_asked():
    costs = Costs(base=np.array([0.5, 0.75, 1.0]), asked=np.array([0.02, 0.03]))
    taken = np.array([0, 1, 2, 2])
    assert costs.mean(taken, (6, 9, 12), [6, 9, 12]) == pytest.approx((0.5 + 0.77 + 1.05 + 1.05) / 4)
    assert costs.mean(np.array([1, 2]), (9, 12), [6, 9, 12]) == pytest.approx((0.75 + 1.03) / 2)


COSTS = Costs(base=np.array([0.5, 0.75, 1.0]), asked=np.array([0.1, 0.1]))


def predictions(num_samples: int, wrong: tuple[int, int] = (0, 0)) -> ExitPredictions:
    """All images are sure at exit 9 and no other; so many are wrong at exit 6 and at exit 9, none at the last one."""
    right = np.ones((num_samples, 3), dtype=np.int64)
    for place, number in enumerate(wrong):
        right[:number, place] = 0
    scores = np.tile(np.array([1.0, 0.0, 1.0]), (num_samples, 1))
    labels = np.ones(num_samples, dtype=np.int64)
    return ExitPredictions([6, 9, 12], np.array([0.5, 0.75, 1.0]), labels, right, {"confidence": scores})


def test_the_fastest_subset_asks_no_exit_in_vain():
    assert fastest(predictions(100), 0.01, COSTS, "confidence") == (6, 12)
    assert fastest(predictions(100, wrong=(100, 0)), 0.01, COSTS, "confidence") == (9, 12)
    # where no subset saves anything, all exits
    assert fastest(predictions(100, wrong=(100, 100)), 0.01, COSTS, "confidence") == (6, 9, 12)


def test_what_exits_take_where_others_certify_them():
    promise = CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95, bound="harm")
    images = predictions(400, wrong=(400, 0)), predictions(200, wrong=(0, 4))
    every = outcome(*images, promise, (6, 9, 12), COSTS, "confidence", 5)
    assert (every.time, every.cost, every.drop) == pytest.approx((0.85, 0.75, 0.02))
    assert outcome(*images, promise, (9, 12), COSTS, "confidence", 5).time == pytest.approx(0.75)


def test_where_nothing_is_certified_no_exit_is_asked():
    promise = CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95, bound="harm")
    images = predictions(400, wrong=(400, 400)), predictions(200)
    assert outcome(*images, promise, (6, 9, 12), COSTS, "confidence", 5) == Outcome(time=1.0, cost=1.0, drop=0.0)
