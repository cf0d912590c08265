# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Small images, and folders of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


# class name → red, green, blue: easy to tell apart
COLOURS = {"crimson": (200, 20, 60), "indigo": (75, 0, 130), "teal": (0, 128, 128)}
TWO_COLOURS = {name: COLOURS[name] for name in ("crimson", "teal")}

# split → images of each class
TRAINING_SIZES = {"train": 12, "validation": 4, "test": 6}
EVALUATION_SIZES = {"train": 3, "validation": 40, "test": 20}


def write_colours(
    folder: Path,
    colours: Mapping[str, tuple[int, int, int]] = COLOURS,
    sizes: Mapping[str, int] = TRAINING_SIZES,
    *,
    deviation: float,
    shape: tuple[int, int],
) -> Path:
    """Writes noise around one colour a class: SPLIT/CLASS/NUMBER.png.

    Args:
        folder: to write to.
        colours: class name → red, green, blue.
        sizes: split → images of each class.
        deviation: of the noise.
        shape: height and width.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(0)
    for split, count in sizes.items():
        for name, colour in colours.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, deviation, (*shape, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def noise(height: int = 40, width: int = 48, seed: int | list[int] = 0) -> Image.Image:
    """RGB image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_image(path: Path, image: Image.Image | None = None) -> Path:
    """Writes an image, by default a small one of noise, and the folders that it lies in. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(8, 8)).save(path)
    return path


def write_classes(folder: Path, sizes: Mapping[str, int]) -> Path:
    """Writes equal images, as many of each class as `sizes` says: CLASS/NUMBER.jpg. Returns the folder."""
    for name, size in sizes.items():
        for number in range(size):
            write_image(folder / name / f"{number:02}.jpg")
    return folder
