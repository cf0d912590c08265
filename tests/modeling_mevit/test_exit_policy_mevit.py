# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from modeling_mevit.exit_policy_mevit import (
    EXIT_COMBINATIONS,
    EXIT_POLICIES,
    combine_exit,
    combine_exits,
    confidence_score,
    entropy_score,
    exit_labels,
    exit_scores,
    first_exit,
    label_streaks,
    margin_score,
    patience_score,
)


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


@pytest.mark.parametrize("policy", EXIT_POLICIES)
def test_float32_whatever_the_precision_of_the_logits(policy):
    uncertainty = torch.tensor([[0.1, 0.2]])
    scores = exit_scores(policy, LOGITS[None].bfloat16(), uncertainty.bfloat16())
    assert scores.dtype == torch.float32 and scores.shape == (1, 2)
    torch.testing.assert_close(scores, exit_scores(policy, LOGITS[None], uncertainty), atol=0.02, rtol=0)


def test_a_streak_is_of_neighbouring_exits():
    labels = torch.tensor([[3, 3, 3, 3], [3, 1, 1, 3], [0, 1, 0, 0]])
    assert label_streaks(labels).tolist() == [[1, 2, 3, 4], [1, 1, 2, 1], [1, 1, 1, 2]]
    assert label_streaks(labels[:, :1]).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("num_exits", [1, 3, 7, 12])
def test_k_exits_in_a_row_are_under_their_threshold_and_no_fewer(num_exits):
    streak = torch.arange(1, num_exits + 1)
    for k in range(1, num_exits + 1):
        assert ((patience_score(streak, num_exits) < 1 - (k - 0.5) / num_exits) == (streak >= k)).all()


def test_policy_names_its_score():
    logits = LOGITS[None]  # one sample, two exits that agree
    uncertainty = torch.tensor([[0.1, 0.2]])
    assert exit_scores("uncertainty", logits, uncertainty).equal(uncertainty)
    assert exit_scores("confidence", logits, None).equal(confidence_score(logits))
    assert exit_scores("entropy", logits, None).equal(entropy_score(logits))
    assert exit_scores("margin", logits, None).equal(margin_score(logits))
    assert exit_scores("patience", logits, None).tolist() == [[0.5, 0.0]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="exit_policy must be one of 'uncertainty', 'confidence', .*; got 'luck'"):
        exit_scores("luck", LOGITS[None], None)
    with pytest.raises(ValueError, match="exit_policy='uncertainty' needs exit_uncertainty, got None"):
        exit_scores("uncertainty", LOGITS[None], None)


def test_the_first_exit_that_lets_a_sample_go_is_taken():
    leaves = torch.tensor([[True, True], [False, True], [False, False]])
    assert first_exit(leaves).tolist() == [0, 1, 2]
    assert first_exit(leaves[:, :0]).tolist() == [0, 0, 0]


def test_an_exit_that_is_no_number_breaks_a_streak():
    agree = torch.tensor([2.0, 1.0]).repeat(4, 1)
    for value in (math.nan, math.inf, -math.inf):
        logits = agree.clone()
        logits[1, 1] = value
        scores = exit_scores("patience", logits[None], None)[0]
        assert scores.isnan().tolist() == [False, True, False, False]
        assert scores[[0, 2, 3]].tolist() == [0.75, 0.75, 0.5]


def test_the_mean_of_log_probabilities_by_hand():
    """Probabilities 0.7, 0.2, 0.1 and 0.1, 0.4, 0.5 and 0.2, 0.2, 0.6, whatever is added to the logits of an exit."""
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5], [0.2, 0.2, 0.6]])
    exit_logits = (probabilities.log() + torch.tensor([[3.0], [-2.0], [40.0]]))[None]
    combined = combine_exits("mean", exit_logits)
    expected = [
        [0.7, 0.2, 0.1],
        [(0.7 * 0.1) ** (1 / 2), (0.2 * 0.4) ** (1 / 2), (0.1 * 0.5) ** (1 / 2)],
        [(0.7 * 0.1 * 0.2) ** (1 / 3), (0.2 * 0.4 * 0.2) ** (1 / 3), (0.1 * 0.5 * 0.6) ** (1 / 3)],
    ]
    torch.testing.assert_close(combined.exp(), torch.tensor([expected]))
    assert exit_labels(exit_logits).tolist() == [[0, 2, 2]] and exit_labels(combined).tolist() == [[0, 1, 2]]
    assert combine_exits("none", exit_logits) is exit_logits


@pytest.mark.parametrize("combination", EXIT_COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exits_one_after_another_are_combined_as_all_at_once(combination, dtype):
    exit_logits = (3 * torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    log_probability_sum = torch.zeros(6, 5)
    for place, expected in enumerate(combine_exits(combination, exit_logits).unbind(1)):
        given, log_probability_sum = combine_exit(combination, exit_logits[:, place], log_probability_sum, place + 1)
        assert given.equal(expected) and given.dtype == (dtype if combination == "none" else torch.float32)
        assert log_probability_sum.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_combination_that_holds_an_exit_that_is_no_number_predicts(value):
    exit_logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    exit_logits[0, 1, 2] = value
    assert (exit_labels(combine_exits("mean", exit_logits)) == -1).tolist() == [[False, True, True, True]]


def test_an_unknown_combination_is_named():
    for combine in (lambda: combine_exits("sum", LOGITS[None]), lambda: combine_exit("sum", LOGITS, LOGITS, 1)):
        with pytest.raises(ValueError, match="exit_combination must be one of 'none', 'mean'; got 'sum'"):
            combine()
