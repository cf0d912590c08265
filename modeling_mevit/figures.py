# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run and of early exit. Each function gives a figure to look at or to save."""

from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from .evaluation import patience_curve
from .exit_record import ExitRecord
from .metrics import oracle_curve, shared_threshold_curve


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


def accuracy_cost_curve(record: ExitRecord, plain_accuracy: float | None = None) -> Figure:
    """Accuracy of early-exit runs by mean cost: a curve for each policy, the oracle's, and the exits as points.

    Args:
        record: of the pictures.
        plain_accuracy: of the plain ViT on them, drawn as a line.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for number, (policy, scores) in enumerate(record.scores.items()):
        costs, accuracies = shared_threshold_curve(scores, record.right, record.costs)
        axes.plot(costs, 100 * accuracies, color=f"C{number}", label=policy)
    costs, accuracies = patience_curve(record)
    axes.plot(costs, 100 * accuracies, color=f"C{len(record.scores)}", marker="x", label="patience")
    costs, accuracies = oracle_curve(record.right, record.costs)
    axes.plot(costs, 100 * accuracies, color="grey", linestyle=":", label="oracle (knows which exits are right)")
    axes.plot(record.costs, 100 * record.right.mean(0), "o", color="black", label="one exit for all pictures")
    for layer, cost, accuracy in zip(record.exit_layers, record.costs, record.right.mean(0), strict=True):
        axes.annotate(str(layer), (cost, 100 * accuracy), xytext=(4, -12), textcoords="offset points")
    if plain_accuracy is not None:
        axes.axhline(100 * plain_accuracy, color="black", linestyle="--", label="plain ViT (cost 1)")
    axes.set(xlabel="mean cost, relative to the plain ViT", ylabel="accuracy (%)")
    axes.legend(frameon=False)
    return figure
