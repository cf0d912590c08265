# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported cascade for programs that have torch: it takes and returns what the PyTorch model does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..configuration_mevit import MEViTConfig
from ..modeling_mevit import MEViTOutput
from .cascade_mevit import Cascade


class MEViTCascade:
    """An exported cascade, called like [`MEViTForImageClassification`].

    Args:
        cascade: the runtime.
        config: of the model that was exported.
    """

    def __init__(self, cascade: Cascade, config: MEViTConfig):
        self.cascade = cascade
        self.config = config

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0
    ) -> "MEViTCascade":
        """Opens the directory that `mevit export --cascade` wrote.

        Raises:
            ValueError: where a file is missing or cannot be read, or a provider is not installed.
        """
        if not Path(directory, "config.json").is_file():  # which is written last
            raise ValueError(f"{directory} is no finished export; it has no config.json.")
        return cls(Cascade(directory, providers, threads), MEViTConfig.from_pretrained(directory))

    def __call__(
        self,
        pixel_values: Tensor | np.ndarray,
        early_exit: bool | None = None,
        exit_thresholds: Sequence[float] | float | None = None,
    ) -> MEViTOutput:
        """Classifies images (B, C, H, W).

        Returns:
            With early exit `logits` (B, L) and `exit_layer` (B,) of the exits taken, else the last exit's `logits`,
            every exit's `exit_logits` (B, E, L) and `exit_scores` (B, E).

        Raises:
            ValueError: what [`Cascade`] raises.
        """
        images = pixel_values.cpu().float().numpy() if isinstance(pixel_values, Tensor) else pixel_values
        if early_exit is None:
            early_exit = self.cascade.config["early_exit"]
        if early_exit or exit_thresholds is not None:  # thresholds without early exit are refused there
            logits, exit_layer = self.cascade(images, early_exit, exit_thresholds)
            return MEViTOutput(logits=torch.from_numpy(logits), exit_layer=torch.from_numpy(exit_layer))
        exit_logits, scores = self.cascade.every_exit(images)
        return MEViTOutput(
            logits=torch.from_numpy(exit_logits[:, -1]),
            exit_logits=torch.from_numpy(exit_logits),
            exit_scores=None if scores is None else torch.from_numpy(scores),
        )
