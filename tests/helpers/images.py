# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders of small images that are easy to tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_colours(
    folder: Path,
    colours: dict[str, tuple[int, int, int]],
    sizes: dict[str, int],
    *,
    deviation: float,
    shape: tuple[int, int],
) -> Path:
    """Writes noise around one colour a class, in ImageFolder layout: SPLIT/CLASS/NUMBER.png.

    Args:
        folder: to write to.
        colours: class name → red, green, blue.
        sizes: split → images of each class.
        deviation: of the noise.
        shape: height and width.
    """
    rng = np.random.default_rng(0)
    for split, count in sizes.items():
        for name, colour in colours.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, deviation, (*shape, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder
