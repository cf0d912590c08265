# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of `training/train.py` on a few small images, and files as a run writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.models import TINY


# of a backbone of 3 layers
SHAPE = {name: TINY[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size", "patch_size")}
SHAPE["num_hidden_layers"] = 3

SETTINGS = {
    "image_size": 16,
    "resize_size": 20,
    "exit_layers": [1, 2, 3],
    "model_config": SHAPE,
    "learning_rate": 0.003,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 6,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "seed": 0,
}


def config_file(directory: Path, **settings: Any) -> str:
    """Writes `SETTINGS`, with some changed, as the config of a run. Returns its path."""
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, **settings}))
    return str(file)


def write_metrics(
    directory: Path, accuracies: Sequence[float], *, seconds: float | None = 120.0, test: bool = True, **recipe: Any
) -> str:
    """Writes `metrics.json` of exits on layers 6 and 12; accuracy on test is half of that given. Returns the path."""
    exits = [
        {"exit": layer, "validation_accuracy": accuracy, **({"test_accuracy": accuracy / 2} if test else {})}
        for layer, accuracy in zip((6, 12), accuracies, strict=True)
    ]
    content = {"exits": exits, "training_seconds": seconds, "recipe": {"seed": 0, "optim": "sgd", **recipe}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps(content))
    return str(directory)


def write_predictions(
    directory: Path, labels: list[int], predictions: list[list[int]], exit_layers: list[int], split: str = "test"
) -> str:
    """Writes `SPLIT_predictions.json`. Returns the path of the directory."""
    directory.mkdir(exist_ok=True)
    content = {"exit_layers": exit_layers, "labels": labels, "predictions": predictions}
    (directory / f"{split}_predictions.json").write_text(json.dumps(content))
    return str(directory)
