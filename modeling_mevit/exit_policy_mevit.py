# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exit scores: one number per sample and exit that says how sure the exit is. Low means sure.

All functions are pure and work in float32, whatever the logits' precision.
"""

import torch
from torch import Tensor


EXIT_POLICIES = ("uncertainty", "confidence", "entropy", "margin")


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
    # entr is 0 at 0, so that a saturated softmax gives 0 and not NaN
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def margin_score(logits: Tensor) -> Tensor:
    """1 − (largest − second largest softmax probability), in [0, 1].

    Args:
        logits: (..., L), L at least 2.

    Returns:
        (...), float32.
    """
    first, second = logits.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return 1 - (first - second)


def exit_scores(policy: str, logits: Tensor, uncertainty: Tensor) -> Tensor:
    """The score of every sample and exit under `policy`.

    Args:
        policy: one of `EXIT_POLICIES`.
        logits: (B, E, L), the exits' logits.
        uncertainty: (B, E), the predicted uncertainty of the exits, equation 3.

    Returns:
        (B, E), float32, low where the exit is sure.

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
    raise ValueError(f"exit_policy={policy!r} is unknown; allowed are {', '.join(map(repr, EXIT_POLICIES))}.")
