# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration on synthetic exits whose true accuracies are known."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from modeling_mevit.early_exit.calibration import (
    Certificate,
    calibrate,
    certified,
    difference_p_value,
    threshold_grid,
    greedy_path,
    harm_p_value,
    never_early,
    p_value,
    required_sample_size,
    shared_thresholds,
    within_cost,
    within_drop,
)
from modeling_mevit.early_exit.predictions import ExitPredictions


COSTS = np.array([0.4, 0.7, 1.0])


def synthetic(images: int, seed: int, harm: float = 0.3) -> ExitPredictions:
    """Three exits on images of difficulty 0 … 1.

    The last exit is right on 90 % of all. Where it is, an early exit is wrong with probability harm times the squared
    difficulty (twice that for the first one); its score is the difficulty with noise.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.random(images)
    last = rng.random(images) < 0.9
    early = [last & ~(rng.random(images) < harm * difficulty**2 * factor) for factor in (2, 1)]
    predictions = np.stack([*early, last], axis=1).astype(np.int64)
    noise = rng.normal(0, 0.1, (images, 3))
    scores = np.clip(difficulty[:, None] * [1.0, 0.9, 0.8] + noise, 1e-6, 1).astype(np.float32)
    return ExitPredictions([6, 9, 12], COSTS, np.ones(images, dtype=np.int64), predictions, {"confidence": scores})


def by_hand() -> ExitPredictions:
    predictions = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    scores = np.array([[0.1, 0], [0.3, 0], [0.2, 0], [0.9, 0]], dtype=np.float32)
    return ExitPredictions([6, 12], np.array([0.5, 1.0]), np.ones(4, dtype=np.int64), predictions, {"margin": scores})


def test_the_outcome_of_a_setting_by_hand():
    record = by_hand()
    places = record.places("margin", [0.25])
    assert places.tolist() == [0, 1, 0, 1]
    outcome = record.outcome(places)
    assert (outcome.accuracy, outcome.full_model_accuracy, outcome.cost) == (0.75, 0.5, 0.75)
    assert (outcome.harms, outcome.corrections, outcome.drop) == (0, 1, -0.25)
    assert outcome.exit_counts == {6: 2, 12: 2}
    bold = record.outcome(record.places("margin", [1.0]))
    assert (bold.harms, bold.corrections, bold.drop, bold.cost) == (1, 1, 0.0, 0.5)


def test_patience_counts_exits_that_agree():
    predictions = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1]])
    record = ExitPredictions([6, 9, 12], COSTS, np.ones(3, dtype=np.int64), predictions, {})
    assert record.places("patience", 1).tolist() == [0, 0, 0]
    assert record.places("patience", 2).tolist() == [1, 2, 2]
    assert record.places("patience", 3).tolist() == [2, 2, 2]
    assert shared_thresholds(record, "patience") == [3, 2, 1]
    assert within_cost(record, "patience", shared_thresholds(record, "patience"), 0.95).setting == 2
    with pytest.raises(ValueError, match="patience has one number"):
        greedy_path(record, "patience")


def test_thresholds_lie_midway_between_neighbouring_scores():
    path = shared_thresholds(by_hand(), "margin")
    assert path[0] == [-math.inf]
    assert [setting[0] for setting in path[1:]] == pytest.approx([0.15, 0.25, 0.6, 1.9])
    assert greedy_path(by_hand(), "margin") == path


@pytest.mark.parametrize("path_of", [shared_thresholds, greedy_path])
def test_budgets_are_kept_and_used(path_of):
    record = synthetic(2000, seed=0)
    path = path_of(record, "confidence")
    for budget in (0.5, 0.6, 0.8):
        outcome = within_cost(record, "confidence", path, budget).outcome
        assert budget - 0.03 < outcome.cost <= budget
    drops = [within_drop(record, "confidence", path, drop).outcome for drop in (0.0, 0.005, 0.02, 0.2)]
    assert all(outcome.drop <= drop for outcome, drop in zip(drops, (0.0, 0.005, 0.02, 0.2), strict=True))
    costs = [outcome.cost for outcome in drops]
    assert costs == sorted(costs, reverse=True) and costs[0] < 1 and costs[-1] == pytest.approx(0.4, abs=0.01)
    with pytest.raises(ValueError, match="max_cost=0.3 is out of reach: leaving at the first exit costs 0.400"):
        within_cost(record, "confidence", path, 0.3)


def test_a_greedy_path_is_nested_and_no_worse_than_a_shared_threshold():
    record = synthetic(2000, seed=0)
    greedy, shared = greedy_path(record, "confidence"), shared_thresholds(record, "confidence")
    assert greedy[0] == never_early(record, "confidence") == [-math.inf, -math.inf]
    assert all(np.all(np.array(later) >= earlier) for earlier, later in zip(greedy, greedy[1:], strict=False))
    assert record.outcome(record.places("confidence", greedy[-1])).cost == pytest.approx(0.4)
    for budget in (0.5, 0.6, 0.7):
        ours, one = (within_cost(record, "confidence", path, budget).outcome for path in (greedy, shared))
        assert ours.accuracy >= one.accuracy - 0.005


def test_p_values_by_hand():
    assert harm_p_value(0, 299, 0.01) <= 0.05 < harm_p_value(0, 298, 0.01)
    assert harm_p_value(3, 500, 0.01) == pytest.approx(binom.cdf(3, 500, 0.01))
    # one stake of 0.5, written out, is one of the gambler's
    stakes = np.linspace(0, 1, 101)[:-1] / 0.99
    capital = ((1 - stakes * 0.99) ** 2 * (1 + stakes * 0.01) ** 95 * (1 + stakes * 1.01) ** 3).mean()
    assert difference_p_value(2, 3, 100, 0.01) == pytest.approx(min(1, 1 / capital))
    assert difference_p_value(50, 0, 100, 0.01) == 1


def test_corrections_certify_what_the_harm_rate_cannot():
    assert harm_p_value(25, 1000, 0.02) > 0.5
    assert difference_p_value(25, 35, 1000, 0.02) < 0.05 < difference_p_value(25, 10, 1000, 0.02)


def test_images_needed():
    assert required_sample_size(0.0, 0.01, 0.95) == 299
    assert required_sample_size(0.01, 0.01, 0.95) is None
    needed = required_sample_size(0.005, 0.01, 0.95)
    assert harm_p_value(math.ceil(0.005 * needed), needed, 0.01) <= 0.05
    fewer = range(1, needed)
    assert not any(harm_p_value(math.ceil(0.005 * images), images, 0.01) <= 0.05 for images in fewer)

    rates = {"bound": "difference", "correction_rate": 0.02}
    needed = required_sample_size(0.025, 0.01, 0.95, **rates)
    assert difference_p_value(0.025 * needed, 0.02 * needed, needed, 0.01) <= 0.05
    assert difference_p_value(0.025 * (needed - 1), 0.02 * (needed - 1), needed - 1, 0.01) > 0.05
    assert required_sample_size(0.03, 0.01, 0.95, **rates) is None


@pytest.mark.parametrize("bound", ["harm", "difference"])
@pytest.mark.parametrize("split_off", [False, True])
def test_the_promise_holds_in_a_simulation(bound, split_off):
    """500 draws of 600 images; the truth is known from 200,000. At 5 %, 33 violations or more have p < 0.05."""
    truth = synthetic(200_000, seed=1_000_000)
    violations, savings = 0, []
    true_drops: dict[tuple, float] = {}
    for seed in range(500):
        record = synthetic(600, seed)
        if split_off:
            path = greedy_path(record.select(np.arange(200)), "confidence", candidates_per_exit=12)
            record = record.select(np.arange(200, 600))
        else:
            path = threshold_grid(record, "confidence", num_labels=2)
        found = certified(record, "confidence", path, max_accuracy_drop=0.02, confidence=0.95, bound=bound).granted
        if found is None:
            savings.append(0.0)
            continue
        key = tuple(found.setting)
        if key not in true_drops:
            true_drops[key] = truth.outcome(truth.places("confidence", found.setting)).drop
        violations += true_drops[key] > 0.02
        savings.append(1 - found.outcome.cost)
    assert violations <= 33
    assert np.mean(savings) > 0.08


def many_exits(images: int, seed: int, harm: float, correction: float) -> ExitPredictions:
    """20 early exits that harm and correct at random, each for itself."""
    rng = np.random.default_rng(seed)
    draw = rng.random((images, 20))
    last = rng.random(images) < 0.5
    wrong, corrected = draw < 2 * harm, draw < 2 * correction  # half of the images can be harmed, half corrected
    early = np.where(last[:, None], ~wrong, corrected)
    predictions = np.concatenate((early, last[:, None]), axis=1).astype(np.int64)
    scores = np.full((images, 21), 0.5, dtype=np.float32)
    return ExitPredictions(
        list(range(1, 22)), np.linspace(0.4, 1, 21), np.ones(images, dtype=np.int64), predictions, {"margin": scores}
    )


@pytest.mark.parametrize(("bound", "harm", "correction"), [("harm", 0.021, 0.0), ("difference", 0.051, 0.03)])
def test_stopping_at_the_first_failure_is_what_keeps_the_promise(bound, harm, correction):
    """Every setting loses 2.1 %, so each certificate of 2 % is wrong. Searching for one that passes finds it often.

    (By the exact bound at least; the betting bound is too careful for that.)
    """
    path = [[1.0 if place == only else 0.0 for place in range(20)] for only in range(20)]
    in_turn = searched = 0
    for seed in range(500):
        record = many_exits(600, seed, harm, correction)
        found = certified(record, "margin", path, max_accuracy_drop=0.02, confidence=0.95, bound=bound)
        in_turn += found.granted is not None
        outcomes = [record.outcome(record.places("margin", setting)) for setting in path]
        searched += any(p_value(outcome, 0.02, bound) <= 0.05 for outcome in outcomes)
    assert in_turn <= 33
    assert bound == "difference" or searched > 66


@pytest.mark.parametrize(("bound", "fewest"), [("harm", 299), ("difference", 452)])
def test_fewer_images_than_a_bound_needs_certify_nothing(bound, fewest):
    """The first settings of the path let no image go, so that nothing is corrected there."""
    promise = {"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": bound}

    def granted(images: int) -> Certificate:
        last = np.arange(images) % 5 > 0
        predictions = np.stack([np.ones(images, dtype=bool), last], axis=1).astype(np.int64)  # never harms
        scores = {"margin": np.full((images, 2), 0.1, np.float32)}
        record = ExitPredictions([6, 12], np.array([0.5, 1.0]), np.ones(images, dtype=np.int64), predictions, scores)
        return calibrate(record, "margin", promise, per_exit=False, num_labels=2)

    assert required_sample_size(0.0, 0.01, 0.95, bound=bound) == fewest
    refused = granted(fewest - 1)
    assert refused.granted is None and refused.refused.outcome.harms == 0
    assert granted(fewest).granted.outcome.cost == 0.5


def test_too_few_images_for_thresholds_per_exit():
    promise = {"max_accuracy_drop": 0.1, "confidence": 0.9}
    with pytest.raises(ValueError, match="1 images are too few"):
        calibrate(synthetic(1, seed=0), "confidence", promise, per_exit=True, num_labels=2)


def test_nothing_is_granted_where_no_image_leaves():
    """A mean of equal costs may be rounded below them."""
    record = synthetic(300, seed=0)
    costs = np.array([0.4, 0.7, 0.9308531978161948])
    record = ExitPredictions(record.exit_layers, costs, record.labels, record.predictions, record.scores)
    assert record.outcome(np.full(300, 2)).cost != costs[-1]
    assert certified(record, "confidence", [[0.0, 0.0]], max_accuracy_drop=0.1, confidence=0.9).granted is None
    wrong = ExitPredictions([6, 9, 12], COSTS, record.labels, record.predictions * [0, 0, 1], record.scores)
    chosen = calibrate(wrong, "confidence", {"max_accuracy_drop": 0.0}, per_exit=False, num_labels=2)
    assert chosen.granted is None


def test_nothing_is_certified_where_early_exits_harm():
    record = synthetic(2000, seed=0, harm=5.0)
    bold = [[0.5, 0.5], [1.0, 1.0]]
    assert certified(record, "confidence", bold, max_accuracy_drop=0.01, confidence=0.95).granted is None
    refused = certified(record, "confidence", bold, max_accuracy_drop=0.01, confidence=0.95).refused
    assert refused.setting == [0.5, 0.5]
    # nor where what is certified saves nothing
    assert certified(record, "confidence", [[0.0, 0.0]], max_accuracy_drop=0.01, confidence=0.95).granted is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_accuracy_drop": 0.0}, "max_accuracy_drop=0.0 is no share"),
        ({"confidence": 1.0}, "confidence=1.0 is no share"),
        ({"bound": "hoeffding"}, "bound='hoeffding' is unknown; allowed are 'harm', 'difference'"),
    ],
)
def test_bad_input_is_named(settings, message):
    record = synthetic(300, seed=0)
    path = threshold_grid(record, "confidence", num_labels=2)
    with pytest.raises(ValueError, match=message):
        certified(record, "confidence", path, **{"max_accuracy_drop": 0.02, "confidence": 0.95, **settings})


def test_the_grid_is_fine_where_uncertainty_lies():
    record = synthetic(images=50, seed=0)
    thresholds = [setting[0] for setting in threshold_grid(record, "uncertainty", num_labels=2)]
    assert thresholds == sorted(thresholds) and thresholds[-1] == 1
    assert len([one for one in thresholds if 0.23 <= one <= 0.45]) > 200
