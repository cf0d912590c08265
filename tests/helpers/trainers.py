# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Trainers of a tiny model on a few images of noise."""

import io
from os import PathLike
from typing import Any

import datasets
import torch

from modeling_mevit import ImageClassificationDataset, MEViTForImageClassification
from modeling_mevit.data.image_processing import image_processor_for, train_transform
from modeling_mevit.trainer import MEViTTrainer, MEViTTrainingArguments
from tests.helpers.images import noise
from tests.helpers.models import tiny_model


def random_images(count: int) -> ImageClassificationDataset:
    """Noise of 24 px with labels in turn, randomly cropped to 16 px: what a step sees depends on the augmentation."""
    images = []
    for number in range(count):
        file = io.BytesIO()
        noise(24, 24, seed=number).save(file, format="PNG")
        images.append({"path": None, "bytes": file.getvalue()})
    rows = datasets.Dataset.from_dict({"image": images, "label": [number % 5 for number in range(count)]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    processor = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3, resize_size=24)
    return ImageClassificationDataset(rows, train_transform(processor), seed=3)


def make_trainer(
    output_dir: str | PathLike[str],
    *,
    model: MEViTForImageClassification | None = None,
    images: int = 40,
    optim: str = "adamw_torch",
    **settings: Any,
) -> MEViTTrainer:
    """A trainer of a model with exits on layers 2 to 6, for 2 epochs of 5 steps."""
    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "num_random_exits": 0,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        **settings,
    }
    return MEViTTrainer(
        model=model or tiny_model(num_hidden_layers=6, exit_layers=[2, 3, 4, 5, 6]),
        args=MEViTTrainingArguments(optim=optim, **arguments),
        train_dataset=random_images(images),
        eval_dataset=random_images(10),
    )


def losses(trainer: MEViTTrainer) -> dict[int, float]:
    """Training loss of each step."""
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Asserts that two models have the same weights, but for rounding."""
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)
