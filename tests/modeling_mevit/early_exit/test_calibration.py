# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration on synthetic exits whose true accuracies are known."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import binom

from modeling_mevit import MEViTConfig
from modeling_mevit.data.identity import encode_digests
from modeling_mevit.early_exit.calibration import (
    CalibrationResult,
    best_within_cost,
    calibrate,
    calibrate_predictions,
    cheapest_within_disagreement,
    cheapest_within_drop,
    check_sample_size,
    control_expectation,
    fixed_sequence_test,
    harm_p_value,
    most_harms,
    required_sample_size,
    shared_thresholds,
    threshold_grid,
)
from modeling_mevit.early_exit.calibration_target import CalibrationTarget
from modeling_mevit.early_exit.evaluation import count_calibration_images
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from tests.helpers.models import TINY, tiny_model
from tests.helpers.random_images import RandomImages


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


def test_a_policy_without_scores_is_named():
    with pytest.raises(ValueError, match="no scores of exit_policy='uncertainty', only of 'margin'"):
        calibrate_predictions(two_exits(4), CalibrationTarget(max_cost=0.9), policy="uncertainty", num_labels=2)


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
    with pytest.raises(ValueError, match="max_cost must be at least 0.400, the cost of the first exit to leave"):
        best_within_cost(tried, 0.3)


def test_p_values_by_hand():
    assert harm_p_value(0, 299, 0.01) <= 0.05 < harm_p_value(0, 298, 0.01)
    assert harm_p_value(3, 500, 0.01) == pytest.approx(binom.cdf(3, 500, 0.01))


def test_harm_allows_what_the_binomial_tail_allows():
    for num_samples, drop in ((298, 0.01), (299, 0.01), (1500, 0.02)):
        allowed = most_harms(num_samples, drop, 0.95, "harm")
        assert len(allowed) == num_samples + 1 and len(set(allowed)) == 1
        assert binom.cdf(allowed[0], num_samples, drop) <= 0.05 < binom.cdf(allowed[0] + 1, num_samples, drop)


def exact_size(allowed: np.ndarray, drop: float, correction_rate: float) -> float:
    """Probability that a drop is certified that is just not allowed, summed over all numbers of corrections."""
    num_samples, corrections = len(allowed) - 1, np.arange(len(allowed))
    others = num_samples - corrections
    share = min((correction_rate + drop) / (1 - correction_rate), 1.0)
    harms_allowed = binom.cdf(np.minimum(allowed, others), others, share)
    return float(binom.pmf(corrections, num_samples, correction_rate) @ harms_allowed)


@pytest.mark.parametrize(
    ("num_samples", "drop", "confidence"),
    [(299, 0.01, 0.95), (400, 0.02, 0.95), (800, 0.005, 0.95), (150, 0.1, 0.8), (60, 0.3, 0.4), (30, 0.3, 0.9)],
)
def test_the_difference_is_valid_at_every_rate_and_never_below_harm(num_samples, drop, confidence):
    """Between the rates that the test itself computes, too."""
    allowed, by_harm = (most_harms(num_samples, drop, confidence, bound) for bound in ("difference", "harm"))
    assert (allowed >= by_harm).all() and (np.diff(allowed) >= 0).all() and allowed[0] == by_harm[0]
    largest = (1 - drop) / 2
    rates = np.concatenate(([0, largest], np.geomspace(1e-8, largest, 300), np.linspace(0, largest, 300)))
    sizes = [exact_size(allowed, drop, rate) for rate in rates]
    assert max(sizes) <= 1 - confidence
    if confidence == 0.95:
        assert max(sizes) > 0.045  # and not slack


def test_corrections_certify_what_the_harm_rate_cannot():
    allowed = most_harms(1000, 0.02, 0.95, "difference")
    assert most_harms(1000, 0.02, 0.95, "harm")[0] < 13 == allowed[2] and allowed[10] < 25 < allowed[35]


def test_required_sample_size():
    assert required_sample_size(0.0, 0.01, 0.95) == 299
    assert required_sample_size(0.01, 0.01, 0.95) is None
    needed = required_sample_size(0.005, 0.01, 0.95)
    assert harm_p_value(math.ceil(0.005 * needed), needed, 0.01) <= 0.05
    fewer = range(1, needed)
    assert not any(harm_p_value(math.ceil(0.005 * images), images, 0.01) <= 0.05 for images in fewer)


def test_required_sample_size_by_the_difference_is_about_right():
    def certify(images: int, harm_rate: float, correction_rate: float) -> bool:
        allowed = most_harms(images, 0.02, 0.95, "difference")
        return round(harm_rate * images) <= allowed[round(correction_rate * images)]

    for harm_rate, correction_rate in ((0.015, 0.01), (0.03, 0.025), (0.01, 0.01)):
        rates = {"bound": "difference", "correction_rate": correction_rate}
        needed = required_sample_size(harm_rate, 0.02, 0.95, **rates)
        assert not certify(int(0.8 * needed), harm_rate, correction_rate)
        assert certify(int(1.2 * needed), harm_rate, correction_rate)
        assert needed <= (required_sample_size(harm_rate, 0.02, 0.95) or math.inf)
    assert required_sample_size(0.03, 0.01, 0.95, bound="difference", correction_rate=0.02) is None
    # without corrections, and without harm, it is the harm rate's
    assert required_sample_size(0.0, 0.02, 0.95, bound="difference", correction_rate=0.01) == 149


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
    """Every threshold loses 2.1 %, so each certificate of 2 % is wrong. Searching for one that passes finds it."""
    sequence = [[1.0 if place == only else 0.0 for place in range(20)] for only in range(20)]
    target = CalibrationTarget(max_accuracy_drop=0.02, confidence=0.95, bound=bound)
    in_turn = searched = 0
    for seed in range(500):
        exits = many_exits(600, seed, harm, correction)
        in_turn += fixed_sequence_test(exits, "margin", sequence, target)[0] is not None
        points = [exits.simulate("margin", thresholds) for thresholds in sequence]
        allowed = most_harms(600, 0.02, 0.95, bound)
        searched += any(point.harms <= allowed[point.corrections] for point in points)
    assert in_turn <= 33 and searched > 66


@pytest.mark.parametrize("bound", ["harm", "difference"])
def test_fewer_images_than_a_bound_needs_certify_nothing(bound):
    """The first thresholds of the grid let no image go, so that nothing is corrected there."""
    fewest = 299
    target = CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95, bound=bound)

    def result(images: int) -> CalibrationResult:
        exits = two_exits(images, corrected=np.arange(images) % 5 == 0)
        return calibrate_predictions(exits, target, policy="margin", num_labels=2)

    assert required_sample_size(0.0, 0.01, 0.95, bound=bound) == fewest
    failed = result(fewest - 1)
    assert failed.operating_point is None and failed.first_failure.harms == 0
    assert failed.required_sample_size == fewest
    assert result(fewest).operating_point.cost == 0.5
    check_sample_size(fewest, target)
    message = "at least 299 images are needed to certify a drop of at most 1.00% with probability 95%, .* got 298"
    with pytest.raises(ValueError, match=message):
        check_sample_size(fewest - 1, target)


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
    with pytest.raises(ValueError, match="needs a target with confidence, got"):
        fixed_sequence_test(exits, "confidence", [[0.5, 0.5]], CalibrationTarget(max_cost=0.5))


def test_the_grid_is_fine_where_uncertainty_lies():
    thresholds = [one[0] for one in threshold_grid("uncertainty", 3, num_labels=2)]
    assert thresholds == sorted(thresholds) and thresholds[-1] == 1
    assert len([one for one in thresholds if 0.23 <= one <= 0.45]) > 200
    assert threshold_grid("entropy", 3, num_labels=5)[-1] == [math.log(5)] * 2


@torch.no_grad()
def test_the_reference_is_the_last_combination():
    model, images = tiny_model(exit_policy="margin", exit_combination="mean"), RandomImages()
    result = calibrate(model, images, CalibrationTarget(max_cost=0.9))
    labels = torch.arange(30) % 5
    early_exit = {"early_exit": True, "exit_thresholds": result.operating_point.thresholds}
    last, taken = (model(images.pixel_values, **run).logits.argmax(-1) == labels for run in ({}, early_exit))
    point = result.operating_point
    assert point.full_model_accuracy == pytest.approx(last.float().mean().item())
    assert (point.harms, point.corrections) == (int((last & ~taken).sum()), int((taken & ~last).sum()))
    assert point.saves and result.made_for["exit_combination"] == "mean"

    result.apply_to(model.config)
    assert not model.config.calibration_mismatches()
    model.config.exit_combination = "none"
    assert model.config.calibration_mismatches() == ["exit_combination is 'none', not 'mean'"]


def test_calibrates_a_model_and_writes_into_its_config(tmp_path):
    model, images = tiny_model(), RandomImages()
    result = calibrate(model, images, CalibrationTarget(max_cost=0.75), policy="confidence", batch_size=7)
    expected = calibrate_predictions(
        predict_exits(model, images), CalibrationTarget(max_cost=0.75), policy="confidence", num_labels=5
    )
    assert result == replace(expected, made_for=model.made_for()) and result.operating_point.cost <= 0.75
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


@pytest.mark.parametrize(
    "target",
    [
        {"max_cost": 0.8},
        {"max_accuracy_drop": 0.05},
        {"max_accuracy_drop": 0.05, "confidence": 0.9},
        {"max_accuracy_drop": 0.05, "guarantee": "expectation"},
    ],
)
def test_exits_that_are_left_out_are_taken_by_no_image(target):
    """As if the model did not have them, since no score is below 0."""
    predictions = synthetic(500, seed=0)
    target = CalibrationTarget(**target, exits=[9, 12])
    found = calibrate_predictions(predictions, target, policy="confidence", num_labels=5).operating_point
    assert found.thresholds[0] == 0.0 < found.thresholds[1]
    assert found.exit_counts[6] == 0 < found.exit_counts[9]
    without = ExitPredictions(
        [9, 12],
        COSTS[1:],
        predictions.labels,
        predictions.predictions[:, 1:],
        {"confidence": predictions.scores["confidence"][:, 1:]},
    )
    alone = calibrate_predictions(
        without, replace(target, exits=None), policy="confidence", num_labels=5
    ).operating_point
    assert found.accuracy == alone.accuracy and found.cost == alone.cost


@pytest.mark.parametrize("exits", [[7, 12], [4]])
def test_a_model_has_the_exits_of_its_target(exits):
    target = CalibrationTarget(max_cost=0.8, exits=exits)
    message = rf"exits must be some of the model's, on layers 2, 3, 4, one of them before the last, got {exits[0]}"
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model(), RandomImages(), target)


def test_the_report_tells_the_certificate_and_what_failed():
    target = CalibrationTarget(max_accuracy_drop=0.02, confidence=0.95)
    report = str(calibrate_predictions(synthetic(600, seed=0), target, policy="confidence", num_labels=2))
    assert "with probability 95%, the true accuracy drop is at most 2.00%" in report
    assert "The first thresholds that failed have mean cost" in report and "by the harm bound" in report
    assert "On 600 images: accuracy" in report


class FromTraining(RandomImages):
    def describe(self):
        return {"name": "photos", "split": "train", "half": None, "sha256": "", "image_digests": ""}


class NeverRead(RandomImages):
    """Whose first image alone may be looked at, for its label."""

    def __getitem__(self, index):
        assert index == 0
        return super().__getitem__(index)


def test_too_few_images_are_told_before_the_model_runs():
    target = CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95)
    with pytest.raises(ValueError, match="at least 299 images are needed .* got 267"):
        calibrate(tiny_model(), NeverRead(267), target)
    with pytest.raises(ValueError, match="at least 299 images are needed .* got 36"):
        calibrate(tiny_model(), Copied(360, different=36), target)  # copies are no evidence


class Copied(RandomImages):
    """The same few images again and again, under other labels, of a data set that tells which they are."""

    def __init__(self, count: int, different: int):
        super().__init__(count)
        self.image_hashes = [f"{index % different:064x}"[::-1] for index in range(count)]

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": index // 7 % 5}

    def describe(self):
        digests = encode_digests(self.image_hashes)
        return {"name": "photos", "split": "validation", "half": None, "sha256": "0", "image_digests": digests}


def test_copies_count_once_and_training_images_never():
    model, images, target = tiny_model(), Copied(30, different=10), CalibrationTarget(max_cost=0.9)
    result = calibrate(model, images, target)
    assert result.operating_point.num_samples == 10
    assert (result.dropped_copies, result.dropped_training_images) == (20, 0)
    first = [images[index] for index in range(10)]  # with the label of the first copy
    expected = calibrate(model, first, target)
    assert result.operating_point == expected.operating_point
    assert expected.data is None and expected.dropped_copies == 0  # nothing tells what a list holds

    model.config.training_images = encode_digests(images.image_hashes[:4])
    result = calibrate(model, images, target)
    assert result.operating_point.num_samples == 6
    assert str(result).startswith(
        "Not counted: 12 images that are copies of others.\nNot counted: 12 images that trained the model.\n"
    )
    result.apply_to(model.config)
    data = model.config.calibration["data"]
    assert (data["dropped_copies"], data["dropped_training_images"]) == (12, 12)
    assert data["image_digests"] == encode_digests(images.image_hashes[4:10])
    assert count_calibration_images(model.config, images) == 18

    model.config.training_images = encode_digests(images.image_hashes)
    with pytest.raises(ValueError, match="needs images that did not train the model, and all 30 given ones did"):
        calibrate(model, images, target)


def test_calls_that_cannot_work_are_named():
    certificate = CalibrationTarget(max_accuracy_drop=0.1, confidence=0.9)
    with pytest.raises(ValueError, match="exit_policy must be one of 'uncertainty', .*; got 'luck'"):
        calibrate(tiny_model(), RandomImages(), certificate, policy="luck")
    combined = tiny_model(exit_policy="margin", exit_combination="mean", uncertainty_input="logits")
    with pytest.raises(ValueError, match="exit_policy='uncertainty' needs exit_combination='none' or"):
        calibrate(combined, NeverRead(30), certificate, policy="uncertainty")
    with pytest.raises(ValueError, match="needs at least two exits; the model has one, on layer 4"):
        calibrate(tiny_model(exit_layers=[4]), RandomImages(), certificate)
    with pytest.raises(ValueError, match="the split 'train' has images that trained the model"):
        calibrate(tiny_model(), FromTraining(), certificate)
    assert calibrate(tiny_model(), FromTraining(), CalibrationTarget(max_cost=0.9)).data["split"] == "train"


# Without labels


def test_a_disagreement_is_certified_as_harm_is():
    """All that early exit changes here are corrections, which a disagreement counts and harm does not."""
    target = CalibrationTarget(max_disagreement=0.02, confidence=0.95)
    most = int(most_harms(400, 0.02, 0.95, "harm")[0])
    within, beyond = (two_exits(400, corrected=np.arange(400) < count) for count in (most, most + 1))
    certified, failed = fixed_sequence_test(within, "margin", [[0.0], [0.2]], target)
    assert (certified.disagreements, certified.cost, failed) == (most, 0.5, None)
    certified, failed = fixed_sequence_test(beyond, "margin", [[0.0], [0.2]], target)
    assert certified is None and failed.disagreements == most + 1

    result = calibrate_predictions(beyond, target, policy="margin", num_labels=2)
    needed = result.required_sample_size
    assert needed == required_sample_size((most + 1) / 400, 0.02, 0.95) > 400
    assert str(result) == (
        "No thresholds that save cost can be certified for a disagreement of at most 2.00% with probability 95%.\n"
        f"The first thresholds that failed have mean cost 0.500, give another label than the last exit to {most + 1} "
        f"of 400 images ({(most + 1) / 400:.2%}); at this rate {needed} images would certify them."
    )


@pytest.mark.parametrize("guarantee", [{"confidence": 0.95}, {"guarantee": "expectation"}, {}], ids=str)
def test_a_disagreement_is_calibrated_without_labels(guarantee):
    """And bounds the drop: harm is never above it."""
    labelled = synthetic(1500, seed=0)
    unlabelled = replace(labelled, labels=None)
    target = CalibrationTarget(max_disagreement=0.02, **guarantee)
    results = [
        calibrate_predictions(given, target, policy="confidence", num_labels=2) for given in (labelled, unlabelled)
    ]
    with_labels, without = (result.operating_point for result in results)
    assert with_labels.thresholds == without.thresholds and without.saves
    assert with_labels.harms <= without.disagreements == with_labels.disagreements <= 0.02 * 1500
    assert (without.accuracy, without.full_model_accuracy, without.harms, without.corrections) == (None,) * 4
    assert without.drop is None
    report = str(results[1])
    assert "accuracy 9" not in report and "None" not in report
    assert f"On 1500 images: disagreement {without.disagreement:.1%}, mean cost" in report


def test_accuracy_needs_labels():
    unlabelled = replace(synthetic(50, seed=0), labels=None)
    for target in (CalibrationTarget(max_cost=0.6), CalibrationTarget(max_accuracy_drop=0.1, confidence=0.9)):
        with pytest.raises(ValueError, match="only max_disagreement can be calibrated without labels, got Calib"):
            calibrate_predictions(unlabelled, target, policy="confidence", num_labels=2)


def test_the_cheapest_within_a_disagreement():
    exits = synthetic(2000, seed=0)
    tried = [exits.simulate("confidence", thresholds) for thresholds in shared_thresholds(exits, "confidence")]
    chosen = [cheapest_within_disagreement(tried, share) for share in (0.0, 0.01, 0.1)]
    assert all(point.disagreement <= share for point, share in zip(chosen, (0.0, 0.01, 0.1), strict=True))
    assert chosen[0].cost > chosen[1].cost > chosen[2].cost


class Unlabelled(Copied):
    """The same few images again and again."""

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index]}

    def describe(self):
        return {**super().describe(), "split": "unlabelled"}


def test_calibrates_a_model_on_images_without_labels(tmp_path):
    model, images = tiny_model(), Unlabelled(60, different=40)
    model.config.training_images = encode_digests(images.image_hashes[:5])
    target = CalibrationTarget(max_disagreement=0.3, confidence=0.9)
    result = calibrate(model, images, target, policy="confidence")
    assert (result.dropped_copies, result.dropped_training_images) == (15, 10)
    result.apply_to(model.config)
    model.config.save_pretrained(tmp_path)
    calibration = MEViTConfig.from_pretrained(tmp_path).calibration
    point = calibration["operating_point"]
    assert point["num_samples"] == 35 and point["disagreements"] == result.operating_point.disagreements
    assert point["accuracy"] is None and point["harms"] is None
    assert CalibrationTarget(**calibration["target"]) == target
    assert count_calibration_images(model.config, images) == 50

    for wrong in (CalibrationTarget(max_cost=0.9), CalibrationTarget(max_accuracy_drop=0.001, confidence=0.9)):
        with pytest.raises(
            ValueError, match="max_cost or max_accuracy_drop needs labels, and these 60 images have no"
        ):
            calibrate(model, images, wrong)
    with pytest.raises(ValueError, match="at least 299 .* disagreement of at most 1.00% .*, even if no label differs"):
        calibrate(model, images, CalibrationTarget(max_disagreement=0.01, confidence=0.95))


# In expectation


def harmed_at(harmed: list[list[bool]]) -> ExitPredictions:
    """Three exits, the last one always right, and scores under which the sequence 0.3, 0.6 lets all leave at the
    second exit, and then at the first."""
    wrong = np.array(harmed)
    predictions = np.concatenate((~wrong, np.ones((len(wrong), 1), dtype=bool)), axis=1).astype(np.int64)
    scores = np.tile(np.array([0.5, 0.2, 0.1], np.float32), (len(wrong), 1))
    return ExitPredictions([6, 9, 12], COSTS, np.ones(len(wrong), dtype=np.int64), predictions, {"margin": scores})


SEQUENCE = [[0.1, 0.1], [0.3, 0.3], [0.6, 0.6]]


def test_an_expectation_counts_whoever_was_harmed_on_the_way():
    """One image is harmed at exit 6, and another one at exit 9, where more careful thresholds let it leave."""
    harmed = np.zeros((199, 2), dtype=bool)
    harmed[0, 0] = harmed[1, 1] = True
    exits = harmed_at(harmed)
    assert [exits.simulate("margin", thresholds).harms for thresholds in SEQUENCE] == [0, 1, 1]
    target = CalibrationTarget(max_accuracy_drop=2 / 200, guarantee="expectation")
    certified, failed, losses = control_expectation(exits, "margin", SEQUENCE, target)
    assert (certified.thresholds, failed.thresholds, losses) == ([0.3, 0.3], [0.6, 0.6], (1, 2))
    target = CalibrationTarget(max_accuracy_drop=3 / 200, guarantee="expectation")
    certified, failed, losses = control_expectation(exits, "margin", SEQUENCE, target)
    assert (certified.thresholds, failed, losses) == ([0.6, 0.6], None, (2, 0))


@pytest.mark.parametrize("kind", ["max_accuracy_drop", "max_disagreement"])
def test_fewer_images_carry_an_expectation(kind):
    """296 images allow one harm at 1 %; 299 without any are needed with 95 %."""
    target = CalibrationTarget(**{kind: 0.01}, guarantee="expectation")

    def certify(images: int, harmed: int) -> CalibrationResult:
        exits = harmed_at(np.arange(images)[:, None] < [0, harmed])
        return calibrate_predictions(exits, target, policy="margin", num_labels=2)

    assert certify(296, 1).operating_point is not None and certify(296, 2).operating_point is None
    assert certify(99, 0).operating_point is not None and certify(98, 0).operating_point is None
    check_sample_size(99, target)
    share = {"max_accuracy_drop": "drop", "max_disagreement": "disagreement"}[kind]
    with pytest.raises(ValueError, match=f"at least 99 images .* a {share} of at most 1.00% on average, even .* 98"):
        check_sample_size(98, target)
    failed = certify(296, 2)
    assert failed.required_sample_size == required_sample_size(2 / 296, 0.01, None)
    assert required_sample_size(0.0, 0.01, None) == 99 and required_sample_size(0.01, 0.01, None) is None
    needed = required_sample_size(0.005, 0.01, None)
    assert needed == 199 and (math.ceil(0.005 * needed) + 1) / (needed + 1) <= 0.01


def test_the_report_tells_an_expectation_from_a_probability():
    exits = synthetic(600, seed=0)

    def report(**arguments) -> str:
        return str(calibrate_predictions(exits, CalibrationTarget(**arguments), policy="confidence", num_labels=2))

    average = report(max_accuracy_drop=0.02, guarantee="expectation")
    assert "Certified in expectation on 600 images, of which 9 were harmed under these thresholds or more" in average
    assert "on average over calibration sets and new images, the accuracy drop is at most 2.00%. Under these very" in (
        average
    )
    assert "only a confidence says how rarely" in average and "probability" not in average
    assert "The average counts calibration sets that certify nothing" in average
    assert "harm 12 of 600 images (2.00%), counting those of more careful ones; at this rate no number of" in average
    assert "share of such images and the accuracy drop are at most" in report(
        max_disagreement=0.02, guarantee="expectation"
    )
    assert "with probability 95%, the true share of such images is at most 2.00%, and so is the accuracy drop." in (
        report(max_disagreement=0.02, confidence=0.95)
    )


def test_a_held_out_split_is_needed_in_expectation_too():
    with pytest.raises(ValueError, match="the split 'train' has images that trained the model"):
        calibrate(tiny_model(), FromTraining(), CalibrationTarget(max_accuracy_drop=0.1, guarantee="expectation"))


@pytest.mark.slow
@pytest.mark.one_major
def test_a_disagreement_holds_in_a_simulation():
    """As the certificates above do; its images have no labels."""
    truth = synthetic(200_000, seed=1_000_000)
    disagreement = cache(lambda *thresholds: truth.simulate("confidence", thresholds).disagreement)
    target = CalibrationTarget(max_disagreement=0.02, confidence=0.95)
    violations, savings = 0, []
    for seed in range(500):
        exits = replace(synthetic(600, seed), labels=None)
        found = calibrate_predictions(exits, target, policy="confidence", num_labels=2).operating_point
        violations += found is not None and disagreement(*found.thresholds) > 0.02
        savings.append(1 - found.cost if found else 0.0)
    assert violations <= 33
    assert np.mean(savings) > 0.08


@pytest.mark.slow
@pytest.mark.one_major
@pytest.mark.parametrize("kind", ["max_accuracy_drop", "max_disagreement"])
def test_an_expectation_holds_in_a_simulation(kind):
    """The mean of 500 draws of 200 images is within the bound, and not far below it; single ones are above it."""
    truth = synthetic(200_000, seed=1_000_000)
    target = CalibrationTarget(**{kind: 0.02}, guarantee="expectation")
    lost = truth.harmed if target.needs_labels else truth.disagrees
    risk = cache(lambda *thresholds: lost(truth.exit_indices("confidence", thresholds)).mean())
    risks = []
    for seed in range(500):
        found = calibrate_predictions(synthetic(200, seed), target, policy="confidence", num_labels=2).operating_point
        risks.append(risk(*found.thresholds) if found else 0.0)
    assert 0.012 < np.mean(risks) <= 0.02 < np.max(risks)


# Beside MAPIE


@pytest.mark.one_major
@pytest.mark.parametrize("num_samples", [512, 1237])
@pytest.mark.parametrize("kind", ["max_accuracy_drop", "max_disagreement"])
def test_certifies_what_mapie_certifies(num_samples, kind):
    """Its `BinaryClassificationController` takes a threshold on a probability. So with two exits, "positive" is to
    leave at the first one, the label is whether the image is lost there, and the risk is P(leaves and is lost).

    Its p-value of a binary risk is the binomial tail at ⌈n · (k / n)⌉, one image too many where n · (k / n) is rounded
    up; for a power of two it never is."""
    risk_control = pytest.importorskip("mapie.risk_control", reason="MAPIE is not installed; the extra dev brings it")
    rng = np.random.default_rng(num_samples)
    scores = rng.random(num_samples)
    last = rng.random(num_samples) < 0.8
    early = np.where(rng.random(num_samples) < 0.1 * scores**2, ~last, last)
    exits = ExitPredictions(
        [6, 12],
        np.array([0.5, 1.0]),
        np.ones(num_samples, dtype=np.int64),
        np.stack((early, last), axis=1).astype(np.int64),
        {"margin": np.stack((scores, scores), axis=1).astype(np.float32)},
    )
    lost = last & ~early if kind == "max_accuracy_drop" else last != early
    thresholds = np.linspace(0, 1, 101)[1:]
    target = CalibrationTarget(**{kind: 0.02}, confidence=0.95)
    found, failed = fixed_sequence_test(exits, "margin", [[float(t)] for t in thresholds], target)
    assert found is not None and failed is not None

    risk = risk_control.BinaryRisk(
        risk_occurrence=lambda is_lost, leaves: (is_lost == 1) & (leaves == 1),
        risk_condition=lambda is_lost, leaves: np.ones(len(is_lost), dtype=bool),
        higher_is_better=False,
    )
    controller = risk_control.BinaryClassificationController(
        lambda sure: np.stack((1 - sure, sure), axis=1),
        risk,
        target_level=0.02,
        confidence_level=0.95,
        best_predict_param_choice=risk,
        list_predict_params=1 - thresholds,
        fwer_method="fixed_sequence",
    )
    controller.calibrate(1 - scores, lost.astype(int))
    theirs = np.max(1 - controller.valid_predict_params)
    (ours,) = found.thresholds
    if num_samples == 512:
        assert ours == pytest.approx(theirs)
        harms = [int(lost[scores < threshold].sum()) for threshold in thresholds]
        p_values = [harm_p_value(count, num_samples, 0.02) for count in harms]
        np.testing.assert_allclose(controller.p_values[:, 0], p_values, rtol=1e-9)
    assert ours >= theirs - 1e-9
