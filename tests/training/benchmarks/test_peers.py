# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""How the peer's answers are read, on a stand-in with its interface; the peer itself is not installed."""

from types import SimpleNamespace

import pytest
import torch

from peers import earlyon_early_exit, measure


pytestmark = pytest.mark.one_major

CONFIDENCES = torch.tensor([[0.9, 0.9], [0.2, 0.9], [0.2, 0.3]])  # of two early exits, for three images


class Peer:
    """Images are their numbers; a batch leaves where all of its images are sure, else at the last exit."""

    def __init__(self):
        self.config = SimpleNamespace(exit_points=["e0", "e1"], confidence_thresholds=[0.8, 0.8])

    def _place(self, images):
        sure = (CONFIDENCES[images[:, 0].long()] >= torch.tensor(self.config.confidence_thresholds)).all(0)
        return int(sure.float().argmax()) if sure.any() else -1

    def __call__(self, images, mode):
        assert mode == "inference" and len(images) == 1
        return SimpleNamespace(prediction=self._logits(images), exit_taken=self._place(images))

    def forward_inference_batched(self, images):
        return SimpleNamespace(predictions=self._logits(images), exit_taken=self._place(images))

    def _logits(self, images):
        return torch.nn.functional.one_hot(images[:, 0].long(), 3).float()


def test_thresholds_are_confidences_and_no_exit_is_the_last_one():
    run = earlyon_early_exit(Peer())
    images = torch.arange(3.0)[:, None]
    taken = [int(run(image, [0.5, 0.5])[0]) for image in images.split(1)]
    assert taken == [0, 1, 2]
    places, labels = run(images, [0.5, 0.5])
    assert places.tolist() == [2, 2, 2] and labels.tolist() == [0, 1, 2]


def test_an_image_of_a_batch_is_right_with_the_exit_that_it_has_alone():
    images = torch.arange(3.0)[:, None]
    scores = torch.cat([1 - CONFIDENCES, torch.zeros(3, 1)], dim=1)
    measured = measure(earlyon_early_exit(Peer()), scores, lambda images: images, images, rounds=1)
    assert sum(measured["exits"]) == 3 and measured["exits"][2] >= 1
    assert measured["right"] == measured["exits"][2]  # in the batch, all go to the end
