# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Label, probability and exit of image files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.image_processing import Transform, evaluation_transform, read_image
from .predictions import Predictor


@dataclass(frozen=True)
class Answer:
    """What a model says of one image.

    Args:
        file: the image's.
        label: the most probable class, by name.
        probability: of it.
        exit_layer: where the image left.
    """

    file: Path
    label: str
    probability: float
    exit_layer: int


@dataclass(frozen=True)
class Failure:
    """Why there is no answer for one image.

    Args:
        file: the image's.
        reason: as a sentence.
    """

    file: Path
    reason: str


@torch.no_grad()
def predict_files(
    predictor: Predictor, image_processor: Any, files: Sequence[Path], *, batch_size: int = 32
) -> Iterator[Answer | Failure]:
    """Classifies image files as the config says, with early exit where it is on.

    Yields:
        For each file, in order, its answer; a failure where it cannot be read, or its result is not a number.
    """
    transform = evaluation_transform(image_processor)
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        read = [_read(file, transform) for file in batch]
        images = [(file, image) for file, image in zip(batch, read, strict=True) if isinstance(image, torch.Tensor)]
        answers = iter(_classify(predictor, images))
        for image in read:
            yield image if isinstance(image, Failure) else next(answers)


def _read(file: Path, transform: Transform) -> torch.Tensor | Failure:
    try:
        return transform(read_image(file))
    except ValueError as error:
        return Failure(file, str(error))


def _classify(predictor: Predictor, images: list[tuple[Path, torch.Tensor]]) -> list[Answer | Failure]:
    """Answers for one batch of files and their images, (C, H, W) each."""
    if not images:
        return []
    config = predictor.config
    outputs = predictor(torch.stack([image for _, image in images]).to(predictor.device))
    assert outputs.logits is not None
    probabilities, labels = outputs.logits.float().softmax(-1).max(-1)
    layers = [config.exit_layers[-1]] * len(images) if outputs.exit_layer is None else outputs.exit_layer.tolist()
    return [
        Failure(file, "the model's result is not a number")
        if math.isnan(probability)
        else Answer(file, config.id2label[label], probability, layer)
        for (file, _), probability, label, layer in zip(
            images, probabilities.tolist(), labels.tolist(), layers, strict=True
        )
    ]
