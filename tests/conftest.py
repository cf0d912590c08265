# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import gc
import os

import pytest
import torch

from modeling_mevit import MEViTForImageClassification
from tests.helpers.models import tiny_model


# the models are so small that waiting for a second thread takes longer than doing without it
torch.set_num_threads(1)
# freeing what a test left in a reference cycle may wait for threads that a forked process does not have
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
        pytest.skip("there is no accelerator")


@pytest.fixture
def model() -> MEViTForImageClassification:
    return tiny_model()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 0])
