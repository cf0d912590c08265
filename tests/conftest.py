# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.helpers.models import tiny_model


# the models are so small that waiting for a second thread takes longer than doing without it
torch.set_num_threads(1)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 0])
