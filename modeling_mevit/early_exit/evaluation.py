# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What a trained model does on a data set: every exit, every policy, and the early-exit run as it really runs."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from .cost import static_exit_costs
from .exit_policy_mevit import SCORES
from .exit_record import ExitPredictions
from .metrics import AccuracyCostArea, ErrorDetection, ExitAccuracy, area_under
from .modeling_mevit import MEViTForImageClassification


@dataclass(frozen=True)
class EarlyExitRun:
    """What an early-exit run predicted, and how long it took beside the plain ViT.

    Args:
        predictions: (N,), int64.
        exit_layer: (N,), int64.
        seconds: of the early-exit run, reading images not counted.
        plain_seconds: of the plain ViT with the same weights, on the same batches in turn.
    """

    predictions: np.ndarray
    exit_layer: np.ndarray
    seconds: float
    plain_seconds: float


def plain_vit(model: MEViTForImageClassification) -> ViTForImageClassification:
    """The library's plain ViT that shares the weights of the model's backbone and last exit; nothing is copied."""
    settings = {name: value for name, value in model.config.to_dict().items() if name in ViTConfig().to_dict()}
    settings.pop("model_type", None)
    config = ViTConfig(**settings, attn_implementation=model.config._attn_implementation)
    with torch.device("meta"):
        plain = ViTForImageClassification(config)
    plain.vit = model.vit
    plain.classifier = model.exits[str(model.config.num_hidden_layers)].classifier
    return plain.train(model.training)


@torch.no_grad()
def run_early_exit(
    model: MEViTForImageClassification, dataset: Dataset, *, batch_size: int = 32, num_workers: int = 0
) -> EarlyExitRun:
    """Runs a calibrated model with early exit, and the plain ViT on the same batches in turn. Shows a progress bar.

    Args:
        model: in eval mode, with thresholds in its config (or patience).
        dataset: of `{"pixel_values": (3, H, W), …}`.
        batch_size: images at a time.
        num_workers: processes that read images.
    """
    plain = plain_vit(model)
    predictions, exit_layer, seconds, plain_seconds = [], [], 0.0, 0.0
    loader = DataLoader(dataset, batch_size, num_workers=num_workers)
    for number, batch in enumerate(tqdm(loader, desc="early exit", unit="batch")):
        pixel_values = batch["pixel_values"].to(model.device)
        if number == 0:  # what the first call of each sets up is not counted
            model(pixel_values, early_exit=True), plain(pixel_values)
        outputs, taken = _timed(model, pixel_values, early_exit=True)
        _, plain_taken = _timed(plain, pixel_values)
        seconds, plain_seconds = seconds + taken, plain_seconds + plain_taken
        predictions.append(outputs.logits.argmax(-1).cpu().numpy())
        exit_layer.append(outputs.exit_layer.cpu().numpy())
    return EarlyExitRun(np.concatenate(predictions), np.concatenate(exit_layer), seconds, plain_seconds)


def evaluate(
    model: MEViTForImageClassification, record: ExitPredictions, run: EarlyExitRun | None = None
) -> dict[str, Any]:
    """Everything that the record of a data set, and an early-exit run on it, tell about a model.

    Returns:
        `images`; `exits`, a row for each exit (`exit`, `accuracy`, `cost` of the model cut there); `policies`,
        policy → `auroc` of each exit (None where it cannot be told, as of patience, which has no score), `area` under
        the accuracy–cost curve and the `oracle`'s; and, with a run, `early_exit`: `accuracy`, `full_model_accuracy`,
        `cost`, `harms`, `corrections`, `exit_counts`, `images_per_second`, `plain_images_per_second` and `time`,
        relative to the plain ViT's.
    """
    layers = record.exit_layers
    accuracies = ExitAccuracy().compute(predictions=record.predictions, references=record.labels, exit_layers=layers)
    costs = static_exit_costs(model.config)
    results: dict[str, Any] = {
        "images": len(record),
        "exits": [
            {"exit": layer, "accuracy": accuracies[f"accuracy/exit_{layer}"], "cost": costs[layer]} for layer in layers
        ],
        "policies": {},
    }
    for policy in SCORES:
        given = {"predictions": record.scores[policy], "references": record.right}
        detection = ErrorDetection().compute(**given, exit_layers=layers)
        areas = AccuracyCostArea().compute(**given, costs=record.costs.tolist())
        auroc = {str(layer): detection[f"auroc/exit_{layer}"] for layer in layers}
        results["policies"][policy] = {
            "auroc": {layer: None if np.isnan(area) else area for layer, area in auroc.items()},
            **areas,
        }
    results["policies"]["patience"] = {
        "auroc": dict.fromkeys(map(str, layers)),
        "area": area_under(*patience_curve(record), record.costs),
        "oracle": areas["oracle"],
    }
    if run is not None:
        outcome = record.outcome(np.searchsorted(layers, run.exit_layer))
        results["early_exit"] = {
            "accuracy": float((run.predictions == record.labels).mean()),
            "full_model_accuracy": outcome.full_model_accuracy,
            "cost": outcome.cost,
            "harms": outcome.harms,
            "corrections": outcome.corrections,
            "exit_counts": {str(layer): count for layer, count in outcome.exit_counts.items()},
            "images_per_second": len(record) / run.seconds,
            "plain_images_per_second": len(record) / run.plain_seconds,
            "time": run.seconds / run.plain_seconds,
        }
    return results


def patience_curve(record: ExitPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Costs and accuracies, (E,) each, of early-exit runs in which 1 … E exits in a row have to agree."""
    runs = [record.outcome(record.places("patience", agreeing)) for agreeing in range(1, len(record.exit_layers) + 1)]
    return np.array([run.cost for run in runs]), np.array([run.accuracy for run in runs])


def class_changes(labels: np.ndarray, predictions: np.ndarray, reference: np.ndarray, num_labels: int) -> np.ndarray:
    """Accuracy of each class by some predictions, less its accuracy by others.

    Args:
        labels: (N,).
        predictions: (..., N), of an early exit say, for one seed or several, of which the mean is taken.
        reference: (..., N), of the last exit.
        num_labels: L.

    Returns:
        (L,), in −1 … 1; NaN for a class without images.
    """
    right, right_at_last = (np.reshape(given == labels, (-1, len(labels))) for given in (predictions, reference))
    gained = right.sum(0) - right_at_last.sum(0)  # (N,), whole numbers, so that gains and losses cancel exactly
    counts = len(right) * np.bincount(labels, minlength=num_labels)
    sums = np.bincount(labels, weights=gained, minlength=num_labels)
    return np.divide(sums, counts, out=np.full(num_labels, np.nan), where=counts > 0)


@torch.no_grad()
def accuracy_of(model: torch.nn.Module, dataset: Dataset, *, batch_size: int = 32) -> float:
    """Accuracy of any image classifier in eval mode: of its `logits`."""
    right = []
    for batch in tqdm(DataLoader(dataset, batch_size), desc="plain ViT", unit="batch"):
        logits = model(batch["pixel_values"].to(model.device)).logits
        right.append(logits.argmax(-1).cpu() == batch["labels"])
    return torch.cat(right).float().mean().item()


def _timed(model: torch.nn.Module, pixel_values: torch.Tensor, **arguments) -> tuple[Any, float]:
    on_accelerator = pixel_values.device.type != "cpu"
    if on_accelerator:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    outputs = model(pixel_values, **arguments)
    if on_accelerator:
        torch.accelerator.synchronize()
    return outputs, time.perf_counter() - start
