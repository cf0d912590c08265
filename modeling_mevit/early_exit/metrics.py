# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""How well scores find errors, and what early exit by them gives at each cost.

N samples, E exits in ascending order.
"""

import numpy as np
from scipy.stats import mannwhitneyu


def auroc_per_exit(scores: np.ndarray, correct: np.ndarray) -> list[float]:
    """How well each exit's score finds its errors: the area under the ROC curve.

    It is the probability that an error has a higher score than a right answer; ties count half.

    Args:
        scores: (N, E), low where an exit is sure.
        correct: (N, E), bool.

    Returns:
        E numbers in 0 … 1; NaN for an exit without an error or without a right answer.
    """
    return [_auroc(scores[~correct[:, e], e], scores[correct[:, e], e]) for e in range(scores.shape[1])]


def shared_threshold_curve(
    scores: np.ndarray, correct: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Costs and accuracies of early-exit runs for every threshold that all exits share.

    Args:
        scores: (N, E), low where an exit is sure.
        correct: (N, E), bool.
        costs: (E,), ascending, of a sample that leaves there.

    Returns:
        Mean cost and accuracy, (T,) each, from everyone at the first exit to everyone at the last one.
    """
    # With a falling threshold t, a sample goes on from exit e where min(scores[: e + 1]) >= t. It moves from exit e
    # to a later one when t reaches the running minimum there; equal minima mean that it passes several exits at once.
    lowest = np.minimum.accumulate(scores[:, :-1], axis=1)  # (N, E − 1)
    moves_at = np.unique(lowest)[::-1]  # distinct thresholds, falling
    order = np.searchsorted(-moves_at, -lowest)  # which threshold makes a sample pass each exit, (N, E − 1)
    cost_change = np.zeros(len(moves_at))
    correct_change = np.zeros(len(moves_at))
    for exit_index in range(scores.shape[1] - 1):
        step = costs[exit_index + 1] - costs[exit_index]
        np.add.at(cost_change, order[:, exit_index], step)
        gained = correct[:, exit_index + 1].astype(float) - correct[:, exit_index]
        np.add.at(correct_change, order[:, exit_index], gained)
    mean_costs = costs[0] + np.append(0, cost_change.cumsum()) / len(scores)
    accuracies = correct[:, 0].mean() + np.append(0, correct_change.cumsum()) / len(scores)
    return mean_costs, accuracies


def oracle_curve(correct: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs and accuracies of runs that know which exits are right: the cheapest corrections come first.

    Args:
        correct: (N, E), bool.
        costs: (E,), ascending.

    Returns:
        Mean cost and accuracy, (T,) each, from everyone at the first exit to everyone as right as can be.
    """
    first_correct = correct.argmax(1)
    later = np.sort(first_correct[correct.any(1) & (first_correct > 0)])
    mean_costs = costs[0] + np.append(0, (costs[later] - costs[0]).cumsum()) / len(correct)
    return mean_costs, correct[:, 0].mean() + np.arange(len(later) + 1) / len(correct)


def area_under(mean_costs: np.ndarray, accuracies: np.ndarray, costs: np.ndarray) -> float:
    """Mean height of a curve of accuracies over the costs from `costs[0]` to `costs[-1]`; flat after its end."""
    if costs[-1] == costs[0]:
        return float(accuracies[-1])
    mean_costs, accuracies = np.append(mean_costs, costs[-1]), np.append(accuracies, accuracies[-1])
    return float(_trapezoid(accuracies, mean_costs) / (costs[-1] - costs[0]))


def _trapezoid(heights: np.ndarray, places: np.ndarray) -> float:
    """`np.trapezoid`, which NumPy 1 calls otherwise."""
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(places)).sum())


def _auroc(errors: np.ndarray, right_answers: np.ndarray) -> float:
    if not len(errors) or not len(right_answers):
        return float("nan")
    return float(mannwhitneyu(errors, right_answers).statistic / (len(errors) * len(right_answers)))
