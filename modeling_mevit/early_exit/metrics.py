# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of multi-exit models as `evaluate` modules that need no network. N samples, E exits in ascending order."""

import datasets
import evaluate
import numpy as np
from scipy.stats import mannwhitneyu


class ExitMetric(evaluate.Metric):
    """A metric of one row of numbers for each sample."""

    description: str
    features: datasets.Features

    def __init__(self, **kwargs):
        # each process of a distributed run computes on what was gathered; none needs a file for it
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.description, citation="", features=self.features)


class ExitAccuracy(ExitMetric):
    """Share of samples that each exit gets right.

    `compute(predictions=(N, E), references=(N,), exit_layers=[…])` gives `accuracy/exit_k` for each exit k, and
    `accuracy`, that of the last one.
    """

    description = "Accuracy of every exit of a multi-exit classifier."
    features = datasets.Features(
        {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
    )

    def _compute(self, predictions, references, exit_layers: list[int]) -> dict[str, float]:
        accuracies = (np.asarray(predictions) == np.asarray(references)[:, None]).mean(0).tolist()  # E numbers
        per_exit = {f"accuracy/exit_{layer}": value for layer, value in zip(exit_layers, accuracies, strict=True)}
        return {"accuracy": accuracies[-1], **per_exit}


class ErrorDetection(ExitMetric):
    """How well an exit's score tells its errors: the probability that an error has a higher score than a right answer.

    `compute(predictions=scores (N, E), references=right (N, E), exit_layers=[…])` gives `auroc/exit_k` for each exit k
    (ties count half; NaN for an exit without an error or without a right answer), and `auroc`, the mean of the others.
    """

    description = "Area under the ROC curve of finding an exit's errors by its score."
    features = datasets.Features(
        {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.List(datasets.Value("bool"))}
    )

    def _compute(self, predictions, references, exit_layers: list[int]) -> dict[str, float]:
        scores, right = np.asarray(predictions), np.asarray(references)
        areas = [_auroc(scores[~right[:, e], e], scores[right[:, e], e]) for e in range(scores.shape[1])]
        per_exit = {f"auroc/exit_{layer}": area for layer, area in zip(exit_layers, areas, strict=True)}
        known = [area for area in areas if not np.isnan(area)]
        return {"auroc": float(np.mean(known)) if known else float("nan"), **per_exit}


class AccuracyCostArea(ExitMetric):
    """Mean accuracy of early-exit runs over all mean costs between the first exit's and the last one's.

    `compute(predictions=scores (N, E), references=right (N, E), costs=[…])` gives `area` for one threshold shared by
    all exits, and `oracle`, that of a policy that knows which exits are right.
    """

    description = "Area under the accuracy–cost curve of early exit, over its range of costs."
    features = ErrorDetection.features

    def _compute(self, predictions, references, costs: list[float]) -> dict[str, float]:
        scores, right, costs = np.asarray(predictions), np.asarray(references), np.asarray(costs)
        return {
            "area": area_under(*shared_threshold_curve(scores, right, costs), costs),
            "oracle": area_under(*oracle_curve(right, costs), costs),
        }


def shared_threshold_curve(scores: np.ndarray, right: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs and accuracies of early-exit runs for every threshold that all exits share.

    Args:
        scores: (N, E), low where an exit is sure.
        right: (N, E), bool.
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
    right_change = np.zeros(len(moves_at))
    for exit_index in range(scores.shape[1] - 1):
        step = costs[exit_index + 1] - costs[exit_index]
        np.add.at(cost_change, order[:, exit_index], step)
        gained = right[:, exit_index + 1].astype(float) - right[:, exit_index]
        np.add.at(right_change, order[:, exit_index], gained)
    mean_costs = costs[0] + np.append(0, cost_change.cumsum()) / len(scores)
    accuracies = right[:, 0].mean() + np.append(0, right_change.cumsum()) / len(scores)
    return mean_costs, accuracies


def oracle_curve(right: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs and accuracies of runs that know which exits are right: the cheapest corrections come first.

    Args:
        right: (N, E), bool.
        costs: (E,), ascending.

    Returns:
        Mean cost and accuracy, (T,) each, from everyone at the first exit to everyone as right as can be.
    """
    first_right = right.argmax(1)
    later = np.sort(first_right[right.any(1) & (first_right > 0)])
    mean_costs = costs[0] + np.append(0, (costs[later] - costs[0]).cumsum()) / len(right)
    return mean_costs, right[:, 0].mean() + np.arange(len(later) + 1) / len(right)


def area_under(mean_costs: np.ndarray, accuracies: np.ndarray, costs: np.ndarray) -> float:
    """Mean height of a curve of accuracies over the costs from `costs[0]` to `costs[-1]`; flat after its end."""
    if costs[-1] == costs[0]:
        return float(accuracies[-1])
    mean_costs, accuracies = np.append(mean_costs, costs[-1]), np.append(accuracies, accuracies[-1])
    return float(np.trapezoid(accuracies, mean_costs) / (costs[-1] - costs[0]))


def _auroc(errors: np.ndarray, right_answers: np.ndarray) -> float:
    if not len(errors) or not len(right_answers):
        return float("nan")
    return float(mannwhitneyu(errors, right_answers).statistic / (len(errors) * len(right_answers)))
