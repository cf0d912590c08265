# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of multi-exit models as `evaluate` modules that need no network."""

import datasets
import evaluate
import numpy as np


class ExitAccuracy(evaluate.Metric):
    """Share of samples that each exit gets right.

    `compute(predictions=(N, E), references=(N,), exit_layers=[…])` gives `accuracy/exit_k` for each exit k, and
    `accuracy`, that of the last one.
    """

    def __init__(self, **kwargs):
        # each process of a distributed run computes on what was gathered; none needs a file for it
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of every exit of a multi-exit classifier.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, exit_layers: list[int]) -> dict[str, float]:
        accuracies = (np.asarray(predictions) == np.asarray(references)[:, None]).mean(0).tolist()  # E numbers
        per_exit = {f"accuracy/exit_{layer}": value for layer, value in zip(exit_layers, accuracies, strict=True)}
        return {"accuracy": accuracies[-1], **per_exit}
