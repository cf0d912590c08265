# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of a training run, of exits and of early exit. Each function returns one to look at or to save."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..early_exit.metrics import oracle_curve, shared_threshold_curve
from ..early_exit.predictions import ExitPredictions


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
    for number, layer in enumerate(exit_layers, start=1):
        colour = colormaps["viridis_r"](number / len(exit_layers))  # light to dark, since exits are ordered
        accuracies = [100 * entry[f"eval_accuracy/exit_{layer}"] for entry in evaluations]
        accuracy_axes.plot(epochs, accuracies, marker=".", color=colour, label=f"exit {layer}")
    accuracy_axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    accuracy_axes.legend(frameon=False)
    return figure


def accuracy_cost_curve(predictions: ExitPredictions, plain_accuracy: float | None = None) -> Figure:
    """Accuracy of early-exit runs by mean cost: a curve for each policy, the oracle's, and the exits as points.

    Args:
        predictions: of every exit on the images to show.
        plain_accuracy: of the plain ViT on them, drawn as a line.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    accuracy_of_exits = 100 * predictions.correct.mean(0)
    for policy, scores in predictions.scores.items():
        costs, accuracies = shared_threshold_curve(scores, predictions.correct, predictions.costs)
        # patience takes so few values that its curve is a handful of points
        axes.plot(costs, 100 * accuracies, marker="x" if policy == "patience" else None, label=policy)
    costs, accuracies = oracle_curve(predictions.correct, predictions.costs)
    axes.plot(costs, 100 * accuracies, color="grey", linestyle=":", label="oracle (knows which exits are right)")
    axes.plot(predictions.costs, accuracy_of_exits, "o", color="black", label="one exit for all images")
    for layer, cost, accuracy in zip(predictions.exit_layers, predictions.costs, accuracy_of_exits, strict=True):
        axes.annotate(str(layer), (cost, accuracy), xytext=(4, -12), textcoords="offset points")
    if plain_accuracy is not None:
        axes.axhline(100 * plain_accuracy, color="black", linestyle="--", label="plain ViT (cost 1)")
    axes.set(xlabel="mean cost, relative to the plain ViT", ylabel="accuracy (%)")
    axes.legend(frameon=False)
    return figure


def exit_accuracies(
    exit_layers: list[int],
    seeds: np.ndarray,
    costs: Sequence[float],
    plain_seeds: np.ndarray,
    early_exit: np.ndarray | None = None,
) -> Figure:
    """Accuracy of each exit by its cost, the plain ViT as a line, and what early exit reaches. The paper's figure 2.

    Bands and bars are standard deviations over seeds.

    Args:
        exit_layers: E layer numbers.
        seeds: (seeds, E), accuracy of each exit.
        costs: E, of the model cut at each exit.
        plain_seeds: (seeds,), accuracy of the plain ViT.
        early_exit: (points, 2), mean cost and accuracy of early-exit runs.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    mean, deviation = _mean_and_deviation(plain_seeds)
    axes.axhline(float(100 * mean), color="black", linestyle="--", label="plain ViT (cost 1)")
    axes.axhspan(
        float(100 * (mean - deviation)), float(100 * (mean + deviation)), color="black", alpha=0.1, linewidth=0
    )
    means, deviations = _mean_and_deviation(seeds)
    axes.errorbar(costs, 100 * means, yerr=100 * deviations, fmt="o", color="C0", capsize=3, label="one exit for all")
    for layer, cost, accuracy in zip(exit_layers, costs, means, strict=True):
        axes.annotate(str(layer), (cost, 100 * accuracy), xytext=(6, -12), textcoords="offset points")
    if early_exit is not None:
        axes.plot(early_exit[:, 0], 100 * early_exit[:, 1], marker=".", color="C1", label="early exit, calibrated")
    axes.set(xlabel="cost, relative to the plain ViT", ylabel="accuracy (%)")
    axes.legend(frameon=False)
    return figure


def attention_maps(images: np.ndarray, maps: np.ndarray, layers: list[int]) -> Figure:
    """Where [CLS] looks: a row for each image, a column for each layer. The paper's figure 3.

    Args:
        images: (B, H, W, 3), in 0 … 1.
        maps: (B, all layers, rows, columns), as `attention.cls_attention` gives them.
        layers: 1-based layers to show.
    """
    figure = Figure(figsize=(1.3 * (1 + len(layers)), 1.4 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(layers), squeeze=False)
    height, width = images.shape[1:3]
    for row, image, of_layers in zip(grid, images, maps, strict=True):
        row[0].imshow(image)
        for axes, layer in zip(row[1:], layers, strict=True):
            axes.imshow(image.mean(-1), cmap="gray")
            of_layer = of_layers[layer - 1]
            axes.imshow(
                of_layer / of_layer.max(),
                cmap="inferno",
                alpha=0.6,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="bilinear",
            )
    for axes, title in zip(grid[0], ("image", *(f"layer {layer}" for layer in layers)), strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure


def class_changes_figure(changes: np.ndarray, title: str = "") -> Figure:
    """Accuracy that each class gains or loses at an early exit, in ascending order. The paper's figure 4.

    Args:
        changes: (L,), as `evaluation.class_changes` gives them; NaN for a class without images is left out.
        title: shown above it.
    """
    ascending = np.sort(changes[~np.isnan(changes)])
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    colours = ["C3" if change < 0 else "C0" for change in ascending]
    axes.bar(np.arange(len(ascending)), 100 * ascending, width=0.9, color=colours)
    axes.axhline(0, color="black", linewidth=0.8)
    lose_nothing = int((ascending >= 0).sum())
    axes.set(xlabel=f"class ({lose_nothing} of {len(ascending)} lose nothing)", ylabel="change (points)", xticks=[])
    axes.set_title(title)
    return figure


def images_by_exit(images: np.ndarray, exit_layer: np.ndarray, exit_layers: list[int], most: int = 8) -> Figure:
    """Images that left at each exit, a row for each.

    Args:
        images: (N, H, W, 3), in 0 … 1.
        exit_layer: (N,), where each left.
        exit_layers: the model's.
        most: images shown of an exit, taken evenly from all that left there.
    """
    figure = Figure(figsize=(1.1 * most, 1.25 * len(exit_layers)), layout="constrained")
    grid = figure.subplots(len(exit_layers), most, squeeze=False)
    for row, layer in zip(grid, exit_layers, strict=True):
        left_here = images[exit_layer == layer]
        shown = np.linspace(0, len(left_here) - 1, min(most, len(left_here))).round().astype(int)
        for axes, image in zip(row, left_here[shown], strict=False):
            axes.imshow(image)
        for axes in row:
            axes.set_axis_off()
        row[0].set_title(f"exit {layer}: {len(left_here)} images", fontsize=9, loc="left")
    return figure


def _mean_and_deviation(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis; one seed has deviation 0."""
    mean = seeds.mean(0)
    return mean, seeds.std(0, ddof=1) if len(seeds) > 1 else np.zeros_like(mean)
