# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Which files are images, by their names. Needs neither torch nor Datasets."""

from functools import cache

from PIL import Image


@cache
def image_extensions() -> set[str]:
    """Of the files that Pillow reads, such as `".jpg"`."""
    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
