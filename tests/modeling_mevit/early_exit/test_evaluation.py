# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import itertools
import json

import numpy as np
import pytest
import torch

from modeling_mevit.data.identity import encode_digests, fingerprint
from modeling_mevit.data.image_dataset import DataSource, ImageClassificationDataset
from modeling_mevit.data.image_processing import image_processor_for
from modeling_mevit.early_exit.calibration import calibrate
from modeling_mevit.early_exit.calibration_target import CalibrationTarget
from modeling_mevit.early_exit.cost import static_exit_costs
from modeling_mevit.early_exit.evaluation import class_changes, classifier_accuracy, evaluate
from modeling_mevit.early_exit.metrics import auroc_per_exit
from modeling_mevit.early_exit.predictions import predict_exits
from modeling_mevit.exit_policy_mevit import EXIT_COMBINATIONS, EXIT_POLICIES
from tests.helpers.images import noise, write_image
from tests.helpers.models import tiny_model
from tests.helpers.random_images import RandomImages


@pytest.mark.parametrize("policy", ["margin", "patience"])
@pytest.mark.parametrize("combination", EXIT_COMBINATIONS)
def test_the_run_is_what_the_predictions_say(policy, combination):
    model, images = tiny_model(exit_policy=policy, exit_combination=combination), RandomImages()
    predictions = predict_exits(model, images)
    # two exits in a row that agree, or half of the images at each exit
    thresholds = [0.5, 0.5]
    if policy == "margin":
        thresholds = (np.median(predictions.scores["margin"][:, :2], axis=0) + 1e-3).tolist()
    model.config.exit_thresholds, model.config.early_exit = thresholds, True
    expected = predictions.simulate(policy, thresholds)
    assert expected.saves and len([count for count in expected.exit_counts.values() if count]) > 1

    evaluation = evaluate(model, images, batch_size=8)
    run = evaluation.early_exit
    assert run.operating_point == expected
    assert run.relative_latency == pytest.approx(run.plain_images_per_second / run.images_per_second)
    assert run.reference == "plain ViT" and run.borderline == 0
    assert [row.cost for row in evaluation.exits] == list(static_exit_costs(model.config).values())
    assert [row.accuracy for row in evaluation.exits] == predictions.correct.mean(0).tolist()
    assert set(evaluation.policies) == set(EXIT_POLICIES)
    for name, quality in evaluation.policies.items():
        np.testing.assert_allclose(
            list(quality.auroc.values()), auroc_per_exit(predictions.scores[name], predictions.correct), atol=0.02
        )
        assert quality.area <= quality.oracle
    stored = json.loads(json.dumps(evaluation.to_dict()))
    assert stored["exit_combination"] == combination
    assert stored["early_exit"]["operating_point"]["thresholds"] == thresholds
    taken = model(images.pixel_values, early_exit=True).logits.argmax(-1).numpy()
    disagreements = int((taken != predictions.predictions[:, -1]).sum())
    assert stored["early_exit"]["operating_point"]["disagreements"] == disagreements
    assert disagreements or policy == "patience"
    assert stored["num_samples"] == 30 and set(stored["policies"]["margin"]["auroc"]) == {"2", "3", "4"}
    assert stored["plain_accuracy"] is None and evaluation.with_plain(0.5).to_dict()["plain_accuracy"] == 0.5


def test_scores_close_to_a_threshold_are_counted_at_exits_that_were_reached():
    model, images = tiny_model(exit_policy="margin"), RandomImages()
    scores = predict_exits(model, images).scores["margin"]
    at_first, at_second = scores[3, 0] + 5e-5, scores[:, 1].min() - 1.0
    model.config.exit_thresholds, model.config.early_exit = [float(at_first), float(at_second)], True
    close = np.abs(scores[:, 0] - at_first) < 1e-4
    assert evaluate(model, images).early_exit.borderline == close.sum() >= 1
    # an image that left at the first exit is not asked at the second one
    model.config.exit_thresholds = [2.0, float(scores[3, 1])]
    assert evaluate(model, images).early_exit.borderline == 0


def test_labels_are_needed():
    unlabelled = [{"pixel_values": pixel_values} for pixel_values in RandomImages(3).pixel_values]
    with pytest.raises(ValueError, match="evaluation needs labels, and these 3 images have none"):
        evaluate(tiny_model(), unlabelled)


def test_without_early_exit_there_is_no_run():
    evaluation = evaluate(tiny_model(), RandomImages())
    assert evaluation.early_exit is None and evaluation.to_dict()["early_exit"] is None


class KnownImages(RandomImages):
    """Images that tell which they are."""

    def __init__(self, first: int = 0, count: int = 6):
        super().__init__(count)
        self.image_hashes = [f"{number:064x}"[::-1] for number in range(first, first + count)]

    def describe(self):
        return {
            "name": "photos",
            "split": "test",
            "half": None,
            "sha256": fingerprint(self.image_hashes, range(len(self))),
            "image_digests": encode_digests(self.image_hashes),
        }


def test_images_that_chose_the_thresholds_are_refused():
    model, seen = tiny_model(), KnownImages()
    model.config.calibration = {"target": {}, "operating_point": {}, "data": seen.describe()}
    with pytest.raises(ValueError, match="2 of these 6 images chose the thresholds"):
        evaluate(model, KnownImages(first=4))
    evaluation = evaluate(model, KnownImages(first=4), allow_calibration_images=True)
    assert evaluation.calibration_images == 2
    assert evaluation.data["name"] == "photos" and "image_digests" not in evaluation.data
    assert evaluate(model, KnownImages(first=6)).calibration_images == 0
    # a calibration from before digests were kept knows the whole set alone
    del model.config.calibration["data"]["image_digests"]
    with pytest.raises(ValueError, match="6 of these 6 images chose the thresholds"):
        evaluate(model, seen)


def test_images_that_chose_the_thresholds_are_recognised_in_other_folders(tmp_path):
    """By content alone: under other names and classes, in another split, among others."""
    model = tiny_model()
    for number in range(6):
        write_image(tmp_path / "before" / "validation" / "a" / f"{number}.png", noise(20, 20, seed=number))
        write_image(tmp_path / "after" / "test" / "b" / f"new-{number}.png", noise(20, 20, seed=100 + number))
    for number in range(20):
        for folder, label in itertools.product(("before", "after"), "ab"):
            image = noise(20, 20, seed=[number, ord(label)])
            write_image(tmp_path / folder / "train" / label / f"{number}.png", image)
    processor = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def images(name: str, split: str) -> ImageClassificationDataset:
        return DataSource(tmp_path / name, split).load({"a": 0, "b": 1}, processor)

    calibrate(model, images("before", "validation"), CalibrationTarget(max_cost=0.9)).apply_to(model.config)
    assert evaluate(model, images("after", "test")).calibration_images == 0
    moved = tmp_path / "before" / "validation" / "a" / "3.png"
    moved.rename(tmp_path / "after" / "test" / "b" / "unseen.png")
    with pytest.raises(ValueError, match="1 of these 7 images chose the thresholds"):
        evaluate(model, images("after", "test"))


@torch.no_grad()
def test_accuracy_of_a_plain_vit():
    model, images = tiny_model(), RandomImages()
    expected = (model(images.pixel_values).logits.argmax(-1) == torch.arange(30) % 5).float().mean().item()
    assert classifier_accuracy(model.to_vit(), images, batch_size=7) == pytest.approx(expected)
    assert 0 < expected < 1


def test_class_changes_by_hand():
    labels = np.array([0, 0, 2, 2, 3])
    last = np.array([[0, 0, 2, 1, 0], [0, 1, 2, 2, 3]])
    early = np.array([[0, 1, 2, 2, 3], [0, 1, 2, 2, 0]])
    changes = class_changes(labels, early, last, num_labels=5)
    assert changes[[0, 2, 3]].tolist() == [-0.25, 0.25, 0.0]  # gains and losses of class 3 cancel exactly
    assert np.isnan(changes[[1, 4]]).all()
    assert class_changes(labels, early[0], last[0], num_labels=5)[2] == 0.5
