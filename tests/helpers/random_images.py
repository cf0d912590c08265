# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets that need no files."""

import torch


class RandomImages(torch.utils.data.Dataset):
    """Images of noise, 16 × 16 pixels, with the labels 0 … 4 in turn."""

    def __init__(self, count: int = 30):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index], "labels": index % 5}
