# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration on synthetic exits whose true accuracies are known."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from modeling_mevit import MEViTConfig
from modeling_mevit.early_exit.calibration import (
    CalibrationResult,
    CalibrationTarget,
    best_within_cost,
    calibrate,
    calibrate_predictions,
    cheapest_within_drop,
    difference_p_value,
    fixed_sequence_test,
    harm_p_value,
    p_value,
    required_sample_size,
    shared_thresholds,
    threshold_grid,
)
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from tests.helpers.datasets import RandomImages
from tests.helpers.models import TINY, tiny_model


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


def two_exits(num_samples: int, corrected: np.ndarray | None = None) -> ExitPredictions:
    """The first exit is always right, and all its scores are 0.1; the last one is wrong where that is a correction."""
    last = np.ones(num_samples, dtype=bool) if corrected is None else ~corrected
    predictions = np.stack([np.ones(num_samples, dtype=bool), last], axis=1).astype(np.int64)
    scores = {"margin": np.full((num_samples, 2), 0.1, np.float32)}
    labels = np.ones(num_samples, dtype=np.int64)
    return ExitPredictions([6, 12], np.array([0.5, 1.0]), labels, predictions, scores)


def test_thresholds_lie_midway_between_neighbouring_scores():
    predictions = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    scores = np.array([[0.1, 0], [0.3, 0], [0.2, 0], [0.9, 0]], dtype=np.float32)
    labels = np.ones(4, dtype=np.int64)
    tried = shared_thresholds(ExitPredictions([6, 12], COSTS[:2], labels, predictions, {"margin": scores}), "margin")
    assert tried[0] == [-math.inf]
    assert [thresholds[0] for thresholds in tried[1:]] == pytest.approx([0.15, 0.25, 0.6, 1.9])


def test_patience_is_calibrated_as_any_score():
    labels = np.ones(3, dtype=np.int64)
    predictions = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1]])
    streaks = np.array([[1, 2, 3], [1, 1, 2], [1, 1, 1]])
    scores = {"patience": (1 - streaks / 3).astype(np.float32)}
    exits = ExitPredictions([6, 9, 12], COSTS, labels, predictions, scores)
    grid = threshold_grid("patience", 3, num_labels=2)
    assert [thresholds[0] for thresholds in grid] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    # three, two and one exits in a row that agree
    assert [exits.exit_indices("patience", thresholds).tolist() for thresholds in grid] == [
        [2, 2, 2],
        [1, 2, 2],
        [0, 0, 0],
    ]
    chosen = calibrate_predictions(exits, CalibrationTarget(max_cost=0.95), policy="patience", num_labels=2)
    assert chosen.operating_point.exit_counts == {6: 0, 9: 1, 12: 2}


def test_budgets_are_kept_and_used():
    exits = synthetic(2000, seed=0)
    tried = [exits.simulate("confidence", thresholds) for thresholds in shared_thresholds(exits, "confidence")]
    for budget in (0.5, 0.6, 0.8):
        assert budget - 0.03 < best_within_cost(tried, budget).cost <= budget
    drops = (0.0, 0.005, 0.02, 0.2)
    chosen = [cheapest_within_drop(tried, drop) for drop in drops]
    assert all(point.drop <= drop for point, drop in zip(chosen, drops, strict=True))
    costs = [point.cost for point in chosen]
    assert costs == sorted(costs, reverse=True) and costs[0] < 1 and costs[-1] == pytest.approx(0.4, abs=0.01)
    with pytest.raises(ValueError, match="max_cost must be at least 0.400, the cost of the first exit, got 0.3"):
        best_within_cost(tried, 0.3)


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


def test_required_sample_size():
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


@pytest.mark.slow
@pytest.mark.one_major
@pytest.mark.parametrize("bound", ["harm", "difference"])
def test_the_certificate_holds_in_a_simulation(bound):
    """500 draws of 600 images; the truth is known from 200,000. At 5 %, 33 violations or more have p < 0.05."""
    truth = synthetic(200_000, seed=1_000_000)
    target = CalibrationTarget(max_accuracy_drop=0.02, confidence=0.95, bound=bound)
    violations, savings = 0, []
    true_drops: dict[tuple, float] = {}
    for seed in range(500):
        found = calibrate_predictions(synthetic(600, seed), target, policy="confidence", num_labels=2).operating_point
        if found is None:
            savings.append(0.0)
            continue
        key = tuple(found.thresholds)
        if key not in true_drops:
            true_drops[key] = truth.simulate("confidence", found.thresholds).drop
        violations += true_drops[key] > 0.02
        savings.append(1 - found.cost)
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


@pytest.mark.slow
@pytest.mark.one_major
@pytest.mark.parametrize(("bound", "harm", "correction"), [("harm", 0.021, 0.0), ("difference", 0.051, 0.03)])
def test_stopping_at_the_first_failure_is_what_keeps_the_promise(bound, harm, correction):
    """Every threshold loses 2.1 %, so each certificate of 2 % is wrong. Searching for one that passes finds it.

    (By the exact bound at least; the betting bound is too careful for that.)
    """
    sequence = [[1.0 if place == only else 0.0 for place in range(20)] for only in range(20)]
    target = CalibrationTarget(max_accuracy_drop=0.02, confidence=0.95, bound=bound)
    in_turn = searched = 0
    for seed in range(500):
        exits = many_exits(600, seed, harm, correction)
        in_turn += fixed_sequence_test(exits, "margin", sequence, target)[0] is not None
        points = [exits.simulate("margin", thresholds) for thresholds in sequence]
        searched += any(p_value(point, 0.02, bound) <= 0.05 for point in points)
    assert in_turn <= 33
    assert bound == "difference" or searched > 66


@pytest.mark.parametrize(("bound", "fewest"), [("harm", 299), ("difference", 452)])
def test_fewer_images_than_a_bound_needs_certify_nothing(bound, fewest):
    """The first thresholds of the grid let no image go, so that nothing is corrected there."""
    target = CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95, bound=bound)

    def result(images: int) -> CalibrationResult:
        exits = two_exits(images, corrected=np.arange(images) % 5 == 0)
        return calibrate_predictions(exits, target, policy="margin", num_labels=2)

    assert required_sample_size(0.0, 0.01, 0.95, bound=bound) == fewest
    failed = result(fewest - 1)
    assert failed.operating_point is None and failed.first_failure.harms == 0
    assert failed.required_sample_size == fewest
    assert result(fewest).operating_point.cost == 0.5


def test_nothing_is_chosen_where_no_image_leaves():
    """A mean of equal costs may be rounded below them."""
    exits = synthetic(300, seed=0)
    costs = np.array([0.4, 0.7, 0.9308531978161948])
    exits = ExitPredictions(exits.exit_layers, costs, exits.labels, exits.predictions, exits.scores)
    assert exits.simulate("confidence", [0.0, 0.0]).cost != costs[-1]
    target = CalibrationTarget(max_accuracy_drop=0.1, confidence=0.9)
    assert fixed_sequence_test(exits, "confidence", [[0.0, 0.0]], target)[0] is None
    wrong = ExitPredictions([6, 9, 12], COSTS, exits.labels, exits.predictions * [0, 0, 1], exits.scores)
    chosen = calibrate_predictions(wrong, CalibrationTarget(max_accuracy_drop=0.0), policy="confidence", num_labels=2)
    assert chosen.operating_point is None
    assert str(chosen) == (
        "No thresholds that let an image leave early are better than running every image to the end."
    )


def test_nothing_is_certified_where_early_exits_harm():
    exits = synthetic(2000, seed=0, harm=5.0)
    target = CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95)
    certified, failed = fixed_sequence_test(exits, "confidence", [[0.5, 0.5], [1.0, 1.0]], target)
    assert certified is None and failed.thresholds == [0.5, 0.5]
    with pytest.raises(ValueError, match="needs a target with max_accuracy_drop and confidence"):
        fixed_sequence_test(exits, "confidence", [[0.5, 0.5]], CalibrationTarget(max_cost=0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs either max_cost or max_accuracy_drop, got max_cost=None and max_accuracy_drop=None"),
        ({"max_cost": 0.5, "max_accuracy_drop": 0.1}, "got max_cost=0.5 and max_accuracy_drop=0.1"),
        ({"max_cost": 0.0}, r"max_cost must be above 0 \(1 is the plain ViT's cost\), got 0.0"),
        ({"max_cost": 0.5, "confidence": 0.9}, "confidence=0.9 needs max_accuracy_drop"),
        ({"max_accuracy_drop": 0.1, "bound": "harm"}, "bound='harm' needs confidence"),
        ({"max_accuracy_drop": 1.0}, "max_accuracy_drop must be at least 0 and below 1, got 1.0"),
        ({"max_accuracy_drop": 0.0, "confidence": 0.9}, "max_accuracy_drop must be between 0 and 1, got 0.0"),
        ({"max_accuracy_drop": 0.1, "confidence": 1.0}, "confidence must be between 0 and 1, got 1.0"),
        (
            {"max_accuracy_drop": 0.1, "confidence": 0.9, "bound": "hoeffding"},
            "bound must be one of 'harm', 'difference', got 'hoeffding'",
        ),
    ],
)
def test_targets_check_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        CalibrationTarget(**arguments)


def test_a_target_tells_what_is_set():
    assert CalibrationTarget(max_cost=0.5).to_dict() == {"max_cost": 0.5}
    assert CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95).to_dict() == {
        "max_accuracy_drop": 0.01,
        "confidence": 0.95,
        "bound": "harm",
    }


def test_the_grid_is_fine_where_uncertainty_lies():
    thresholds = [one[0] for one in threshold_grid("uncertainty", 3, num_labels=2)]
    assert thresholds == sorted(thresholds) and thresholds[-1] == 1
    assert len([one for one in thresholds if 0.23 <= one <= 0.45]) > 200
    assert threshold_grid("entropy", 3, num_labels=5)[-1] == [math.log(5)] * 2


def test_calibrates_a_model_and_writes_into_its_config(tmp_path):
    model, images = tiny_model(), RandomImages()
    result = calibrate(model, images, CalibrationTarget(max_cost=0.75), policy="confidence", batch_size=7)
    expected = calibrate_predictions(
        predict_exits(model, images), CalibrationTarget(max_cost=0.75), policy="confidence", num_labels=5
    )
    assert result == expected and result.operating_point.cost <= 0.75
    assert model.config.early_exit is False  # nothing is written unasked

    result.apply_to(model.config)
    assert model.config.early_exit and model.config.exit_policy == "confidence"
    assert model(images.pixel_values).exit_layer.float().mean() < 4
    model.config.save_pretrained(tmp_path)
    loaded = MEViTConfig.from_pretrained(tmp_path)
    assert loaded.exit_thresholds == result.operating_point.thresholds
    assert loaded.calibration["target"] == {"max_cost": 0.75} and loaded.calibration["data"] is None
    assert loaded.calibration["operating_point"]["exit_counts"]["2"] == result.operating_point.exit_counts[2]

    CalibrationResult(result.target, None).apply_to(loaded)
    assert (loaded.early_exit, loaded.exit_thresholds, loaded.calibration) == (False, None, None)


def test_thresholds_that_let_nobody_leave_can_be_stored():
    """Minus infinity is no JSON."""
    point = two_exits(3).simulate("margin", [-math.inf])
    config = MEViTConfig(**{**TINY, "exit_layers": [2, 4]})
    CalibrationResult(CalibrationTarget(max_cost=1.0), point).apply_to(config)
    assert config.exit_thresholds == [0.0] == config.calibration["operating_point"]["thresholds"]


def test_the_report_tells_the_certificate_and_what_failed():
    target = CalibrationTarget(max_accuracy_drop=0.02, confidence=0.95)
    report = str(calibrate_predictions(synthetic(600, seed=0), target, policy="confidence", num_labels=2))
    assert "with probability 95%, the true accuracy drop is at most 2.00%" in report
    assert "The first thresholds that failed have mean cost" in report and "by the harm bound" in report
    assert "On 600 images: accuracy" in report


class FromTraining(RandomImages):
    def describe(self):
        return {"name": "photos", "split": "train", "half": None, "sha256": "", "image_digests": ""}


def test_calls_that_cannot_work_are_named():
    certificate = CalibrationTarget(max_accuracy_drop=0.1, confidence=0.9)
    with pytest.raises(ValueError, match="policy must be one of 'uncertainty', .*, got 'luck'"):
        calibrate(tiny_model(), RandomImages(), certificate, policy="luck")
    with pytest.raises(ValueError, match="needs at least two exits; the model has one, on layer 4"):
        calibrate(tiny_model(exit_layers=[4]), RandomImages(), certificate)
    with pytest.raises(ValueError, match="the split 'train' has images that trained the model"):
        calibrate(tiny_model(), FromTraining(), certificate)
    assert calibrate(tiny_model(), FromTraining(), CalibrationTarget(max_cost=0.9)).data["split"] == "train"
