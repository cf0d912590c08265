# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from modeling_mevit.exit_initialization import standardize_exits
from tests.helpers.models import tiny_model


def test_classifiers_read_features_of_mean_0_and_deviation_1():
    model = tiny_model().train()
    images = torch.randn(40, 3, 16, 16)
    standardize_exits(model, images.split(16))
    assert model.training
    read = {}
    for layer, own_exit in model.exits.items():
        own_exit.classifier.register_forward_hook(
            lambda module, args, output, layer=layer: read.__setitem__(layer, args[0])
        )
    with torch.no_grad():
        model.eval()(images)
    for layer in ("2", "3", "4"):
        torch.testing.assert_close(read[layer].mean(0), torch.zeros(32), atol=1e-4, rtol=0)
        torch.testing.assert_close(read[layer].std(0), torch.ones(32), atol=1e-4, rtol=0)


def test_a_feature_that_does_not_vary_stays_finite():
    model = tiny_model()
    image = torch.randn(1, 3, 16, 16)
    standardize_exits(model, [image.expand(4, -1, -1, -1)])
    assert model(image).exit_logits.isfinite().all()


@pytest.mark.parametrize("batches", [[], [torch.randn(1, 3, 16, 16)]])
def test_fewer_than_two_images_are_refused(batches):
    with pytest.raises(ValueError, match=f"at least two images are needed to standardise exits, got {len(batches)}"):
        standardize_exits(tiny_model(), batches)
