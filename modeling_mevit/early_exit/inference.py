# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Label, probability and exit of image files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.image_processing import evaluation_transform, read_image
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


@torch.no_grad()
def predict_files(
    predictor: Predictor, image_processor: Any, files: Sequence[Path], *, batch_size: int = 32
) -> Iterator[Answer]:
    """Classifies image files as the config says, with early exit where it is on.

    Raises:
        ValueError: where a file cannot be read.
    """
    config, transform = predictor.config, evaluation_transform(image_processor)
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        outputs = predictor(torch.stack([transform(read_image(file)) for file in batch]).to(predictor.device))
        assert outputs.logits is not None
        probabilities, labels = outputs.logits.float().softmax(-1).max(-1)
        layers = [config.exit_layers[-1]] * len(batch)
        if outputs.exit_layer is not None:
            layers = outputs.exit_layer.tolist()
        for file, label, probability, layer in zip(
            batch, labels.tolist(), probabilities.tolist(), layers, strict=True
        ):
            yield Answer(file, config.id2label[label], probability, layer)
