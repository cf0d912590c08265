# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exit policies: the score that says whether an exit is sure enough for a sample to leave.

A score is one number per sample and exit, low if the exit is sure; a sample leaves at its first exit whose score is
under that exit's threshold. What an exit predicts with, and is scored by, is its own logits or their combination with
those of the exits passed before. All functions are pure and work in float32, whatever the logits' precision.

B samples, E exits in ascending order, L labels.
"""

import torch
from torch import Tensor


EXIT_POLICIES = ("uncertainty", "confidence", "entropy", "margin", "patience")
EXIT_COMBINATIONS = ("none", "mean")
NO_LABEL = -1


def combine_exit(
    combination: str, logits: Tensor, log_probability_sum: Tensor, num_exits: int
) -> tuple[Tensor, Tensor]:
    """What one exit predicts with, where the exits are run one after another.

    Under `"mean"` it is the mean of the log-probabilities (log-softmax) of this exit and of those passed before. Its
    softmax is that of a geometric mean of probabilities. Where logits are not all finite, neither is the combination
    of this exit or of a later one.

    Args:
        combination: one of `EXIT_COMBINATIONS`.
        logits: (..., L), of the exit.
        log_probability_sum: (..., L), float32, of the exits passed before; zeros at the first exit.
        num_exits: how many exits have been passed with this one.

    Returns:
        The exit's combination (..., L), which under `"none"` is its logits, and the sum to go on with (..., L).

    Raises:
        ValueError: if the combination is unknown.
    """
    if combination == "none":
        return logits, log_probability_sum
    if combination == "mean":
        log_probability_sum = log_probability_sum + logits.float().log_softmax(-1)
        return log_probability_sum / num_exits, log_probability_sum
    raise ValueError(
        f"exit_combination must be one of {', '.join(map(repr, EXIT_COMBINATIONS))}; got {combination!r}."
    )


def combine_exits(combination: str, exit_logits: Tensor) -> Tensor:
    """What every exit predicts with: [`combine_exit`] from the first exit to the last.

    Args:
        combination: one of `EXIT_COMBINATIONS`.
        exit_logits: (B, E, L), of the exits themselves.

    Returns:
        (B, E, L); under `"mean"` float32, whatever the logits' precision.

    Raises:
        ValueError: if the combination is unknown.

    Example:

    ```python
    >>> import torch
    >>> exit_logits = torch.tensor([[[0.8, 0.2], [0.2, 0.8]]]).log()  # 1 sample, 2 exits, 2 labels
    >>> combine_exits("mean", exit_logits).exp()  # √(0.8 · 0.2) twice at the second exit
    tensor([[[0.8000, 0.2000],
             [0.4000, 0.4000]]])

    ```
    """
    if combination == "none":
        return exit_logits
    log_probability_sum = torch.zeros_like(exit_logits[:, 0], dtype=torch.float32)
    combined = []
    for num_exits, logits in enumerate(exit_logits.unbind(1), start=1):
        predicted_with, log_probability_sum = combine_exit(combination, logits, log_probability_sum, num_exits)
        combined.append(predicted_with)
    return torch.stack(combined, dim=1)


def confidence_score(logits: Tensor) -> Tensor:
    """1 − the largest softmax probability, in [0, 1 − 1/L].

    Args:
        logits: (..., L).

    Returns:
        (...), float32.

    Example:

    ```python
    >>> import torch
    >>> confidence_score(torch.tensor([0.5, 0.25, 0.25]).log())
    tensor(0.5000)

    ```
    """
    return 1 - logits.float().softmax(-1).amax(-1)


def entropy_score(logits: Tensor) -> Tensor:
    """Entropy of the softmax distribution in nats, in [0, ln L].

    Args:
        logits: (..., L).

    Returns:
        (...), float32.

    Example:

    ```python
    >>> import torch
    >>> entropy_score(torch.zeros(4)) / torch.tensor(4.0).log()
    tensor(1.)

    ```
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

    Example:

    ```python
    >>> import torch
    >>> margin_score(torch.tensor([0.5, 0.25, 0.25]).log())
    tensor(0.7500)

    ```
    """
    first, second = logits.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return 1 - (first - second)


def exit_labels(exit_logits: Tensor) -> Tensor:
    """What exits predict.

    Args:
        exit_logits: (..., L).

    Returns:
        (...), int64, from 0 to L − 1, and `NO_LABEL` where logits are not all finite: such an exit predicts nothing.

    Example:

    ```python
    >>> import torch
    >>> exit_labels(torch.tensor([[0.0, 3.0], [torch.nan, 3.0]]))
    tensor([ 1, -1])

    ```
    """
    return exit_logits.argmax(-1).where(exit_logits.isfinite().all(-1), NO_LABEL)


def label_streaks(labels: Tensor) -> Tensor:
    """How many exits in a row, up to each one, predict the same label.

    Args:
        labels: (B, E), int64, predicted by the exits.

    Returns:
        (B, E), int64, from 1 to the exit's 1-based place.

    Example:

    ```python
    >>> import torch
    >>> label_streaks(torch.tensor([[7, 7, 3, 3, 3]]))
    tensor([[1, 2, 1, 2, 3]])

    ```
    """
    streaks = [torch.ones_like(labels[:, 0])]
    for previous, label in zip(labels.T, labels.T[1:], strict=False):
        streaks.append(torch.where(label == previous, streaks[-1] + 1, 1))
    return torch.stack(streaks, dim=1)


def patience_score(streak: Tensor, num_exits: int) -> Tensor:
    """1 − streak / E, in [0, 1 − 1/E].

    k exits in a row that agree have a score of 1 − k/E, so that a threshold of 1 − (k − 0.5)/E lets them leave.

    Args:
        streak: (...), of [`label_streaks`].
        num_exits: E, of the whole model.

    Returns:
        (...), float32.

    Example:

    ```python
    >>> import torch
    >>> patience_score(torch.tensor([1, 2, 4]), num_exits=4)
    tensor([0.7500, 0.5000, 0.0000])

    ```
    """
    return 1 - streak.float() / num_exits


def exit_scores(policy: str, exit_logits: Tensor, exit_uncertainty: Tensor | None) -> Tensor:
    """The score of every sample and exit under `policy`.

    Args:
        policy: one of `EXIT_POLICIES`.
        exit_logits: (B, E, L), what the exits predict with ([`combine_exits`]). Under `"patience"` of all exits; the
            other scores are each exit's own.
        exit_uncertainty: (B, E), predicted, equation 3; only `"uncertainty"` needs it.

    Returns:
        (B, E), float32, low if the exit is sure. NaN under `"patience"` where an exit's logits are not all finite:
        that exit agrees with none.

    Raises:
        ValueError: if the policy is unknown, or `"uncertainty"` is given none.

    Example:

    ```python
    >>> import torch
    >>> exit_scores("patience", torch.tensor([[[2.0, 1.0], [0.0, 3.0], [1.0, 2.0]]]), None)
    tensor([[0.6667, 0.6667, 0.3333]])

    ```
    """
    if policy == "uncertainty":
        if exit_uncertainty is None:
            raise ValueError("exit_policy='uncertainty' needs exit_uncertainty, got None.")
        return exit_uncertainty.float()
    if policy == "confidence":
        return confidence_score(exit_logits)
    if policy == "entropy":
        return entropy_score(exit_logits)
    if policy == "margin":
        return margin_score(exit_logits)
    if policy == "patience":
        labels = exit_labels(exit_logits)
        scores = patience_score(label_streaks(labels), num_exits=exit_logits.shape[1])
        return scores.where(labels != NO_LABEL, torch.nan)
    raise ValueError(f"exit_policy must be one of {', '.join(map(repr, EXIT_POLICIES))}; got {policy!r}.")


def first_exit(leaves: Tensor) -> Tensor:
    """Where each sample leaves.

    Args:
        leaves: (B, E − 1), bool, whether each early exit would let the sample go.

    Returns:
        (B,), int64, 0-based place of the first exit that does, E − 1 if none does.

    Example:

    ```python
    >>> import torch
    >>> first_exit(torch.tensor([[False, True], [False, False]]))
    tensor([1, 2])

    ```
    """
    last = leaves.new_ones(len(leaves), 1)
    return torch.cat((leaves, last), dim=1).int().argmax(1)
