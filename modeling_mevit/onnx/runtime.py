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
        return cls(Cascade(directory, providers, threads), MEViTConfig.from_pretrained(directory))

    def __call__(
        self,
        pixel_values: Tensor | np.ndarray,
        early_exit: bool | None = None,
        exit_thresholds: Sequence[float] | float | None = None,
    ) -> MEViTOutput:
        """Classifies pictures (B, C, H, W), float32: `logits` (B, L) and `exit_layer` (B,) of the exits taken."""
        pictures = pixel_values.cpu().numpy() if isinstance(pixel_values, Tensor) else pixel_values
        logits, exit_layer = self.cascade(pictures, early_exit, exit_thresholds)
        return MEViTOutput(logits=torch.from_numpy(logits), exit_layer=torch.from_numpy(exit_layer))
