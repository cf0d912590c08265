# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from exit_subsets import Costs, subsets_of


pytestmark = pytest.mark.one_major


def test_every_subset_of_the_early_exits_ends_in_the_last_one():
    assert subsets_of([6, 9, 12]) == [(6, 12), (9, 12), (6, 9, 12)]


def test_an_image_pays_for_the_exits_before_its_own_that_are_asked():
    costs = Costs(base=np.array([0.5, 0.75, 1.0]), asked=np.array([0.02, 0.03]))
    taken = np.array([0, 1, 2, 2])
    assert costs.mean(taken, (6, 9, 12), [6, 9, 12]) == pytest.approx((0.5 + 0.77 + 1.05 + 1.05) / 4)
    assert costs.mean(np.array([1, 2]), (9, 12), [6, 9, 12]) == pytest.approx((0.75 + 1.03) / 2)
