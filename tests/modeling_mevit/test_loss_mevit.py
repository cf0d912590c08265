# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from modeling_mevit.loss_mevit import cross_entropy, distillation_loss, uncertainty_loss, uncertainty_target


# two samples, two exits, two labels; the softmax of each exit's logits
PROBABILITIES = torch.tensor([[[0.8, 0.2], [0.9, 0.1]], [[0.6, 0.4], [0.3, 0.7]]])
LOGITS = PROBABILITIES.log() + 5
LABELS = torch.tensor([0, 1])


def test_cross_entropy_is_the_mean_over_the_batch_for_each_exit():
    expected = [-(math.log(0.8) + math.log(0.4)) / 2, -(math.log(0.9) + math.log(0.7)) / 2]
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS), torch.tensor(expected))


def test_target_is_tanh_of_the_l1_distance_to_the_label():
    # |0.8 − 1| + |0.2 − 0| = 0.4 and so on
    distances = [[0.2 + 0.2, 0.1 + 0.1], [0.6 + 0.6, 0.3 + 0.3]]
    expected = torch.tensor([[math.tanh(distance) for distance in sample] for sample in distances])
    torch.testing.assert_close(uncertainty_target(LOGITS, LABELS), expected)


def test_uncertainty_loss_is_the_mean_squared_error_of_each_exit():
    uncertainty = torch.tensor([[0.5, 0.1], [0.0, 0.4]])
    target = torch.tensor([[0.3, 0.1], [0.1, 0.0]])
    torch.testing.assert_close(uncertainty_loss(uncertainty, target), torch.tensor([(0.04 + 0.01) / 2, 0.16 / 2]))


def test_distillation_is_the_divergence_from_the_last_exit():
    first = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
    second = 0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4)
    torch.testing.assert_close(distillation_loss(LOGITS), torch.tensor([(first + second) / 2]))


def test_distillation_at_temperature_2():
    # logits / 2 make probabilities proportional to their square roots
    def divergence(teacher, student):
        teacher, student = ([math.sqrt(p) for p in side] for side in (teacher, student))
        teacher, student = ([p / sum(side) for p in side] for side in (teacher, student))
        return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))

    expected = 2**2 * (divergence([0.9, 0.1], [0.8, 0.2]) + divergence([0.3, 0.7], [0.6, 0.4])) / 2
    torch.testing.assert_close(distillation_loss(LOGITS, temperature=2.0), torch.tensor([expected]))


def test_one_exit_has_nothing_to_learn_from():
    assert distillation_loss(LOGITS[:, :1]).shape == (0,)


def test_teacher_and_target_get_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    distillation_loss(logits).sum().backward()
    assert logits.grad[:, -1].eq(0).all()
    assert logits.grad[:, 0].ne(0).all()
    assert not uncertainty_target(logits, LABELS).requires_grad


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_gradients_are_finite_where_the_softmax_is_saturated(scale):
    logits = (scale * torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[-1.0, 1.0], [-1.0, 1.0]]])).requires_grad_()
    uncertainty = torch.sigmoid(logits[..., 0])
    loss = cross_entropy(logits, LABELS) + uncertainty_loss(uncertainty, uncertainty_target(logits, LABELS))
    (loss.sum() + distillation_loss(logits).sum()).backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()
    assert logits.grad.ne(0).any()


def test_losses_of_half_precision_are_computed_in_float32():
    for loss in (cross_entropy(LOGITS.bfloat16(), LABELS), distillation_loss(LOGITS.bfloat16())):
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_out_of_range_is_named(label):
    with pytest.raises(ValueError, match=rf"labels must be from 0 to 1, .* 2 labels; got .*{label}"):
        cross_entropy(LOGITS, torch.tensor([0, label]))
