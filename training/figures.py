# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run. Each function gives a figure to look at or to save."""

from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure


def training_curve(log_history: list[dict[str, Any]], exit_layers: list[int]) -> Figure:
    """Training loss by step, and validation accuracy of each exit by epoch.

    Args:
        log_history: `trainer.state.log_history`.
        exit_layers: the exits whose accuracy is drawn.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    steps = [entry for entry in log_history if "loss" in entry]
    loss_axes.plot([entry["epoch"] for entry in steps], [entry["loss"] for entry in steps], color="black")
    loss_axes.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))

    evaluations = [entry for entry in log_history if "eval_accuracy" in entry]
    epochs = [entry["epoch"] for entry in evaluations]
    for place, layer in enumerate(exit_layers, start=1):
        colour = colormaps["viridis_r"](place / len(exit_layers))  # light to dark, since exits are ordered
        accuracies = [100 * entry[f"eval_accuracy/exit_{layer}"] for entry in evaluations]
        accuracy_axes.plot(epochs, accuracies, marker=".", color=colour, label=f"exit {layer}")
    accuracy_axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    accuracy_axes.legend(frameon=False)
    return figure
