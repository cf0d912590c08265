# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""From an image file to a tensor: reading, the test transform and the training transform.

The transforms are TransFG's (He et al., AAAI 2022): both sides are resized to 600/448 of the model's image size,
training crops at random and flips, testing crops the centre. Only the training transform needs torchvision.

Whatever is measured, predicted or exported is resized by Pillow. Transformers 5 resizes with torchvision where it can,
which gives about one value in a hundred another grey level.
"""

import io
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import DeiTImageProcessor
from transformers.image_utils import load_image

from ..vit_backbone_mevit import to_2tuple


RESIZE_RATIO = 600 / 448

Transform = Callable[[Image.Image], torch.Tensor]
AutoAugment = Literal["imagenet", "ta_wide"]


def read_image(path_or_bytes: str | PathLike[str] | bytes | io.BytesIO, banner: int = 0) -> Image.Image:
    """Reads one image in full, upright and without its banner.

    Args:
        path_or_bytes: path to an image file, or its content, also as a stream, whose name then stands in messages.
        banner: height, in pixels, of what is cut off at the bottom.

    Returns:
        RGB image, turned by the orientation in its EXIF data, as `pipeline("image-classification")` reads it too.
        Grey values of 16 bits are scaled to 8, where the pipeline cuts them off at 255.

    Raises:
        ValueError: if the image cannot be read or has other values, naming its path.
    """
    name = "stored as bytes" if isinstance(path_or_bytes, bytes) else path_or_bytes
    try:
        with Image.open(io.BytesIO(path_or_bytes) if isinstance(path_or_bytes, bytes) else path_or_bytes) as file:
            image = load_image(_with_8_bits(file))
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads to
        raise ValueError(f"cannot read the image {name}: {error}") from error
    return image.crop((0, 0, image.width, image.height - banner))


def image_processor_for(
    image_size: int | tuple[int, int],
    *,
    image_mean: list[float],
    image_std: list[float],
    resize_size: int | tuple[int, int] | None = None,
) -> DeiTImageProcessor:
    """Makes the test transform: resize both sides, crop the centre, scale to [0, 1], normalise.

    Args:
        image_size: height and width of the crop, in pixels; one number for a square.
        image_mean: mean of each RGB channel, of values in [0, 1].
        image_std: standard deviation of each RGB channel.
        resize_size: height and width of the resized image, in pixels; by default 600/448 of the crop's. The aspect
            ratio is not kept, as in TransFG.

    Returns:
        An image processor that `AutoImageProcessor.from_pretrained` loads once it is saved. It is DeiT's, since
        ViT's ignores the centre crop in Transformers 4.

    Raises:
        ValueError: if the crop is larger than the resized image.
    """
    height, width = to_2tuple(image_size)
    default = (round(RESIZE_RATIO * height), round(RESIZE_RATIO * width))
    resized = default if resize_size is None else to_2tuple(resize_size)
    if resized[0] < height or resized[1] < width:
        raise ValueError(f"resize_size must be at least image_size, {(height, width)}, on both sides, got {resized}")
    image_processor = DeiTImageProcessor(
        do_resize=True,
        size={"height": resized[0], "width": resized[1]},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(image_mean),
        image_std=list(image_std),
    )
    return on_pillow(image_processor)


def on_pillow(image_processor: Any) -> Any:
    """The image processor that does the same with Pillow: itself, unless it is Transformers 5's on torchvision."""
    pillow = getattr(transformers, f"{type(image_processor).__name__}Pil", None)
    return image_processor if pillow is None else pillow.from_dict(image_processor.to_dict())


def train_transform(
    image_processor: DeiTImageProcessor,
    auto_augment: AutoAugment | None = None,
    min_crop_area: float | None = None,
) -> Transform:
    """Makes the training transform that belongs to a test transform: random crop and flip in place of the centre.

    Args:
        image_processor: processor of `image_processor_for`; sizes, interpolation, mean and deviation are read from it.
        auto_augment: `"imagenet"`: AutoAugment's ImageNet policy too, as TransFG does for Stanford Cars; `"ta_wide"`:
            TrivialAugment (Müller and Hutter, ICCV 2021), one operation of random strength on each image. The names
            are those of torchvision's training scripts.
        min_crop_area: smallest share of an image's area, above 0 and at most 1, that a crop keeps. Crops then have
            random area and aspect ratio, and are resized (`RandomResizedCrop`; Szegedy et al., CVPR 2015). Without it
            they have the test crop's size, from the resized image.

    Returns:
        Function from an RGB image to a float32 tensor `(3, H, W)`. It draws from torch's global random state.

    Raises:
        ImportError: if torchvision is not installed.
        ValueError: if `min_crop_area` is not above 0 and at most 1, or `auto_augment` has no such policy.
    """
    from torchvision.transforms import v2  # needed to train only

    if auto_augment not in (None, *get_args(AutoAugment)):
        raise ValueError(f"auto_augment must be one of {', '.join(get_args(AutoAugment))}, got {auto_augment!r}")
    if min_crop_area is not None and not 0 < min_crop_area <= 1:
        raise ValueError(f"min_crop_area must be above 0 and at most 1, got {min_crop_area}")
    resized, crop = ((size["height"], size["width"]) for size in (image_processor.size, image_processor.crop_size))
    interpolation = image_processor.resample
    if min_crop_area is None:
        crops = [v2.Resize(resized, interpolation=interpolation), v2.RandomCrop(crop)]
    else:
        crops = [v2.RandomResizedCrop(crop, scale=(min_crop_area, 1.0), interpolation=interpolation)]
    return v2.Compose(
        [
            *crops,
            v2.RandomHorizontalFlip(),
            *([v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)] if auto_augment == "imagenet" else []),
            *([v2.TrivialAugmentWide()] if auto_augment == "ta_wide" else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(image_processor.image_mean, image_processor.image_std),
            v2.ToPureTensor(),
        ]
    )


def evaluation_transform(image_processor: DeiTImageProcessor) -> Transform:
    """Makes the test transform, the image processor on Pillow, a function from an RGB image to float32 `(3, H, W)`."""
    return partial(_processed, on_pillow(image_processor))


def denormalize(pixel_values: torch.Tensor, image_processor: DeiTImageProcessor) -> np.ndarray:
    """Normalised images (N, 3, H, W) as the model saw them, to look at: (N, H, W, 3) in 0 … 1."""
    images = pixel_values.permute(0, 2, 3, 1).numpy() * image_processor.image_std + image_processor.image_mean
    return images.clip(0, 1)


def _with_8_bits(image: Image.Image) -> Image.Image:
    """An image as it is, but for grey values of 16 bits, which Pillow would cut off at 255."""
    if image.mode == "F":
        raise ValueError("images must have 8 or 16 bits per channel, got a floating-point image")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(ImageOps.exif_transpose(image))
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"images must have 8 or 16 bits per channel, got values from {values.min()} to {values.max()}"
        )
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _processed(image_processor: DeiTImageProcessor, image: Image.Image) -> torch.Tensor:
    # said, since the image processor takes an image of 1 or 3 rows for one whose channels come first
    layout = {"input_data_format": "channels_last"}
    pixel_values: torch.Tensor = image_processor(image, return_tensors="pt", **layout)["pixel_values"]  # (1, 3, H, W)
    return pixel_values[0]
