# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What an exported cascade does on a data set, and how long it takes beside the single graph of the last exit."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .cascade_mevit import Cascade


def evaluate_cascade(directory: Path, dataset: Dataset, *, batch_size: int = 32) -> dict[str, Any]:
    """Runs the cascade as it is calibrated, and `model.onnx` on the same batches in turn. Shows a progress bar.

    Args:
        directory: what `mevit export --cascade` wrote.
        dataset: of `{"pixel_values": (3, H, W), "labels": int}`.
        batch_size: images at a time.

    Returns:
        `images`, `accuracy`, `full_model_accuracy` (of `model.onnx`), `cost`, `exit_counts`, `borderline` (how many
        had a score within 1e-4 of a threshold, so that PyTorch may have them leave elsewhere), `images_per_second`,
        `full_images_per_second` (of `model.onnx`) and `time`, relative to it.

    Raises:
        ValueError: where files are missing or damaged, or early exit is off in the export.
    """
    if not (directory / "model.onnx").is_file():
        raise ValueError(f"{directory} has no model.onnx to compare with; export the last exit too.")
    cascade = Cascade(directory)
    if not cascade.config["early_exit"]:
        raise ValueError(
            f"{directory} does not leave early: the model was not calibrated, nothing could be certified in a lower "
            f"precision, or --no-early-exit was given."
        )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # they take turns
    full = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])

    right, right_at_last, exit_layers, seconds, full_seconds = [], [], [], 0.0, 0.0
    for number, batch in enumerate(tqdm(DataLoader(dataset, batch_size), desc="cascade", unit="batch")):
        images, labels = batch["pixel_values"].numpy(), batch["labels"].numpy()
        if number == 0:  # what the first call of each sets up is not counted
            cascade(images), full.run(["logits"], {"pixel_values": images})
            cascade.borderline = 0
        start = time.perf_counter()
        logits, exit_layer = cascade(images)
        middle = time.perf_counter()
        (last_logits,) = full.run(["logits"], {"pixel_values": images})
        seconds, full_seconds = seconds + middle - start, full_seconds + time.perf_counter() - middle
        right.append(logits.argmax(-1) == labels)
        right_at_last.append(last_logits.argmax(-1) == labels)
        exit_layers.append(exit_layer)
    taken = np.concatenate(exit_layers)
    costs = {stage["exit_layer"]: stage["cost"] for stage in cascade.config["stages"]}
    return {
        "images": len(taken),
        "accuracy": float(np.concatenate(right).mean()),
        "full_model_accuracy": float(np.concatenate(right_at_last).mean()),
        "cost": float(np.mean([costs[layer] for layer in taken])),
        "exit_counts": {str(layer): int((taken == layer).sum()) for layer in costs},
        "borderline": cascade.borderline,
        "images_per_second": len(taken) / seconds,
        "full_images_per_second": len(taken) / full_seconds,
        "time": seconds / full_seconds,
    }
