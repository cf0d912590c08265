# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_mevit.early_exit.cost import dynamic_exit_costs
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from modeling_mevit.exit_policy_mevit import EXIT_COMBINATIONS, EXIT_POLICIES, combine_exits, exit_scores
from tests.helpers.models import tiny_model
from tests.helpers.random_images import RandomImages


def by_hand() -> ExitPredictions:
    predictions = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    scores = np.array([[0.1, 0], [0.3, 0], [0.2, 0], [0.9, 0]], dtype=np.float32)
    return ExitPredictions([6, 12], np.array([0.5, 1.0]), np.ones(4, dtype=np.int64), predictions, {"margin": scores})


def test_an_operating_point_by_hand():
    predictions = by_hand()
    assert predictions.exit_indices("margin", [0.25]).tolist() == [0, 1, 0, 1]
    point = predictions.simulate("margin", [0.25])
    assert (point.policy, point.thresholds, point.num_samples) == ("margin", [0.25], 4)
    assert (point.accuracy, point.full_model_accuracy, point.cost) == (0.75, 0.5, 0.75)
    assert (point.harms, point.corrections, point.drop, point.saves) == (0, 1, -0.25, True)
    assert (point.disagreements, point.disagreement) == (1, 0.25)
    assert point.exit_counts == {6: 2, 12: 2}
    assert json.loads(json.dumps(point.to_dict()))["exit_counts"] == {"6": 2, "12": 2}
    bold = predictions.simulate("margin", [1.0])
    assert (bold.harms, bold.corrections, bold.drop, bold.cost, bold.disagreements) == (1, 1, 0.0, 0.5, 2)
    assert predictions.harmed(np.zeros(4, int)).tolist() == [False, True, False, False]
    assert predictions.disagrees(np.zeros(4, int)).tolist() == [False, True, True, False]
    assert not predictions.simulate("margin", [0.0]).saves


def test_two_wrong_labels_disagree_too():
    predictions = ExitPredictions([6, 12], np.array([0.5, 1.0]), np.array([0]), np.array([[1, 2]]), {})
    point = predictions.operating_point("margin", [0.5], np.array([0]))
    assert (point.harms, point.corrections, point.disagreements) == (0, 0, 1)


def test_without_labels_accuracy_is_not_known():
    unlabelled = replace(by_hand(), labels=None)
    point, expected = unlabelled.simulate("margin", [0.25]), by_hand().simulate("margin", [0.25])
    unknown = dict.fromkeys(("accuracy", "full_model_accuracy", "harms", "corrections"))
    assert point == replace(expected, **unknown) and point.drop is None
    assert json.loads(json.dumps(point.to_dict())) == {**json.loads(json.dumps(expected.to_dict())), **unknown}
    assert len(unlabelled.select(np.array([0, 1]))) == 2 and unlabelled.select(np.array([0])).labels is None
    with pytest.raises(ValueError, match="accuracy needs labels, and these 4 images have none"):
        _ = unlabelled.correct


def test_some_of_the_images():
    some = by_hand().select(np.array([True, False, False, True]))
    assert len(some) == 2 and some.correct.tolist() == [[True, True], [False, False]]
    assert some.simulate("margin", [0.5]).exit_counts == {6: 1, 12: 1}


@pytest.mark.parametrize("combination", EXIT_COMBINATIONS)
@pytest.mark.parametrize("policy", ["uncertainty", "margin"])
@torch.no_grad()
def test_predictions_are_those_of_the_model(combination, policy):
    model, images = tiny_model(exit_combination=combination, exit_policy=policy), RandomImages()
    predictions = predict_exits(model, images, batch_size=8)
    outputs = model(images.pixel_values)
    assert predictions.exit_layers == [2, 3, 4]
    assert predictions.labels.tolist() == [index % 5 for index in range(30)]
    combined = combine_exits(combination, outputs.exit_logits)
    assert predictions.predictions.tolist() == combined.argmax(-1).tolist()
    assert set(predictions.scores) == set(EXIT_POLICIES)
    for policy, scores in predictions.scores.items():
        expected = exit_scores(policy, combined, model.uncertainty(combined))
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)
    assert predictions.costs.tolist() == list(dynamic_exit_costs(model.config).values())


@torch.no_grad()
def test_a_predictor_of_logits_scores_no_combination():
    model = tiny_model(exit_policy="margin", exit_combination="mean", uncertainty_input="logits")
    assert set(predict_exits(model, RandomImages(3)).scores) == {*EXIT_POLICIES} - {"uncertainty"}


def test_predicts_images_without_labels():
    model, images = tiny_model(), RandomImages(7)
    unlabelled = [{"pixel_values": images.pixel_values[index]} for index in range(7)]
    predictions = predict_exits(model, unlabelled, batch_size=4)
    assert predictions.labels is None
    assert predictions.predictions.tolist() == predict_exits(model, images).predictions.tolist()


def test_workers_read_the_same_images():
    model, images = tiny_model(), RandomImages(8)
    alone, with_workers = (predict_exits(model, images, batch_size=4, num_workers=workers) for workers in (0, 2))
    np.testing.assert_array_equal(alone.scores["margin"], with_workers.scores["margin"])


def test_a_model_that_gives_nan_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.exits["3"].classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be numbers, and some are NaN"):
        predict_exits(model, RandomImages())
    with pytest.raises(ValueError, match="must be in eval mode to predict"):
        predict_exits(tiny_model().train(), RandomImages())
    with pytest.raises(ValueError, match="the data set has no images; at least one is needed"):
        predict_exits(model, RandomImages(0))
