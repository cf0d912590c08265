# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from modeling_mevit.exit_policy_mevit import confidence_score, entropy_score, exit_scores, margin_score


# softmax of these is (1/2, 1/4, 1/4) and (0.7, 0.2, 0.1)
LOGITS = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]]).log() + 3


def test_scores_against_hand_calculations():
    torch.testing.assert_close(confidence_score(LOGITS), torch.tensor([0.5, 0.3]))
    torch.testing.assert_close(margin_score(LOGITS), torch.tensor([0.75, 0.5]))
    entropies = [1.5 * math.log(2), -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))]
    torch.testing.assert_close(entropy_score(LOGITS), torch.tensor(entropies))


@pytest.mark.parametrize("score", [confidence_score, entropy_score, margin_score])
def test_a_saturated_softmax_scores_0(score):
    assert score(torch.tensor([1e4, 0.0, -1e4])) == 0


@pytest.mark.parametrize("score", [confidence_score, entropy_score, margin_score])
def test_float32_whatever_the_precision_of_the_logits(score):
    scores = score(LOGITS.bfloat16())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, score(LOGITS), atol=0.02, rtol=0)


def test_policy_names_its_score():
    logits = LOGITS[None]  # one sample, two exits
    uncertainty = torch.tensor([[0.1, 0.2]])
    assert exit_scores("uncertainty", logits, uncertainty).equal(uncertainty)
    assert exit_scores("confidence", logits, uncertainty).equal(confidence_score(logits))
    assert exit_scores("entropy", logits, uncertainty).equal(entropy_score(logits))
    assert exit_scores("margin", logits, uncertainty).equal(margin_score(logits))
    with pytest.raises(ValueError, match="exit_policy='luck' is unknown; allowed are 'uncertainty', 'confidence'"):
        exit_scores("luck", logits, uncertainty)
