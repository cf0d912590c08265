# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exit policies: when an exit is sure enough for a sample to leave.

All but one have a score, one number per sample and exit, low where the exit is sure, and a sample leaves where it is
under the exit's threshold. The other is patience: a sample leaves where the last k exits agree. All functions are pure
and work in float32, whatever the logits' precision.
"""

import torch
from torch import Tensor


SCORES = ("uncertainty", "confidence", "entropy", "margin")
EXIT_POLICIES = (*SCORES, "patience")


def confidence_score(logits: Tensor) -> Tensor:
    """1 − the largest softmax probability, in [0, 1 − 1/L].

    Args:
        logits: (..., L).

    Returns:
        (...), float32.
    """
    return 1 - logits.float().softmax(-1).amax(-1)


def entropy_score(logits: Tensor) -> Tensor:
    """Entropy of the softmax distribution in nats, in [0, ln L].

    Args:
        logits: (..., L).

    Returns:
        (...), float32.
    """
    # a log softmax is finite where its softmax is 0, so that a saturated one gives 0 and not NaN
    log_probabilities = logits.float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def margin_score(logits: Tensor) -> Tensor:
    """1 − (largest − second largest softmax probability), in [0, 1].

    Args:
        logits: (..., L), L at least 2.

    Returns:
        (...), float32.
    """
    first, second = logits.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return 1 - (first - second)


def exit_scores(policy: str, logits: Tensor, uncertainty: Tensor) -> Tensor | None:
    """The score of every sample and exit under `policy`.

    Args:
        policy: one of `EXIT_POLICIES`.
        logits: (B, E, L), the exits' logits.
        uncertainty: (B, E), the predicted uncertainty of the exits, equation 3.

    Returns:
        (B, E), float32, low where the exit is sure; None for `"patience"`.

    Raises:
        ValueError: where the policy is none of them.
    """
    if policy == "uncertainty":
        return uncertainty.float()
    if policy == "confidence":
        return confidence_score(logits)
    if policy == "entropy":
        return entropy_score(logits)
    if policy == "margin":
        return margin_score(logits)
    if policy == "patience":
        return None
    raise ValueError(f"exit_policy={policy!r} is unknown; allowed are {', '.join(map(repr, EXIT_POLICIES))}.")


def agreement(predictions: Tensor) -> Tensor:
    """How many exits in a row, up to each one, predict the same label: what patience compares with k.

    Args:
        predictions: (B, E), int64, labels in the order of the exits.

    Returns:
        (B, E), int64, from 1 to the exit's place.
    """
    exits = torch.arange(predictions.shape[1], device=predictions.device).expand_as(predictions)
    is_change = torch.ones_like(predictions, dtype=torch.bool)
    is_change[:, 1:] = predictions[:, 1:] != predictions[:, :-1]
    last_change = torch.where(is_change, exits, 0).cummax(dim=1).values
    return exits - last_change + 1


def first_exit(leaves: Tensor) -> Tensor:
    """Where each sample leaves.

    Args:
        leaves: (B, E − 1), bool, whether each early exit would let the sample go.

    Returns:
        (B,), int64, place of the first exit that does, E − 1 where none does.
    """
    last = leaves.new_ones(len(leaves), 1)
    return torch.cat((leaves, last), dim=1).int().argmax(1)
