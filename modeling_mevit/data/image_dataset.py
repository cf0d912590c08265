# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The data set that a Trainer, a calibration or an evaluation reads: rows of images, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._extras import extras_named
from .identity import encode_digests, fingerprint, image_hashes, public_name
from .image_processing import Transform, evaluation_transform, read_image


if TYPE_CHECKING:
    import datasets
    from transformers import DeiTImageProcessor


@dataclass(frozen=True)
class DataSource:
    """Which images to calibrate or evaluate a trained model on.

    Attributes:
        name_or_path: of a data set, see [`~data.datasets.load_splits`].
        split: `"train"`, `"validation"`, `"test"`, or `"all"` for everything that the data set holds; `"unlabelled"`
            for every image in a folder, without labels.
        half: `"first"` or `"second"` half of the split, drawn at random from each class, always the same one.
        image_column: of a Hub data set; by default its only one of type `Image`.
        label_column: of a Hub data set; by default its only one of type `ClassLabel`. For FGVC-Aircraft in its
            original layout, `"family"` or `"manufacturer"`.
    """

    name_or_path: str | PathLike[str]
    split: str = "test"
    half: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    def load(self, label2id: dict[str, int], image_processor: DeiTImageProcessor) -> ImageClassificationDataset:
        """Reads the images as the model sees them, with the labels as it numbers them.

        Args:
            label2id: of the model's config.
            image_processor: saved with the model.

        Raises:
            ValueError: as [`~data.datasets.load_split`] does.
            MissingExtraError: where the package `datasets` is not installed.
        """
        # imported here, since it needs the package `datasets`, which reading given rows does not
        with extras_named("reading a data set"):
            from .datasets import load_split

        rows = load_split(
            self.name_or_path,
            self.split,
            label2id=label2id,
            half=self.half,
            image_column=self.image_column,
            label_column=self.label_column,
        )
        return ImageClassificationDataset(rows, evaluation_transform(image_processor), source=self)


class ImageClassificationDataset(torch.utils.data.Dataset[dict[str, torch.Tensor | int]]):
    """Images as a Trainer reads them.

    Args:
        rows: split of `load_splits` or `load_split`.
        transform: function from an RGB image to a float32 tensor `(3, H, W)`.
        seed: with a seed, what the transform draws is a function of (seed, epoch, sample index) alone, whatever the
            order, the workers and the global random state, so that a resumed run sees the images it would have
            seen. Without one the transform draws from the global state.
        source: where the rows come from, for `describe`.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        transform: Transform,
        seed: int | None = None,
        source: DataSource | None = None,
    ):
        self.rows = rows
        self.transform = transform
        self.seed = seed
        self.source = source
        # in shared memory, so that workers that are already running see the new epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels."""
        return "label" in self.rows.column_names

    @cached_property
    def image_hashes(self) -> list[str]:
        """SHA-256, in hexadecimal, of each image's content; the files are read once and not decoded."""
        return image_hashes(self.rows)

    def describe(self) -> dict[str, Any] | None:
        """Which images these are, as a checkpoint's `calibration["data"]` keeps it; None without a source.

        Returns:
            `name` (a Hub id, or a local folder's own name), `split`, `half`, `sha256` (of all images and their labels)
            and `image_digests` (of each image, see [`~data.identity.encode_digests`]).
        """
        if self.source is None:
            return None
        labels = self.rows["label"][:] if self.has_labels else None
        return {
            "name": public_name(self.source.name_or_path),
            "split": self.source.split,
            "half": self.source.half,
            "sha256": fingerprint(self.image_hashes, labels),
            "image_digests": encode_digests(self.image_hashes),
        }

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0, that augmentation depends on, in loader workers too."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Returns `pixel_values`, float32 `(3, H, W)`, and `labels`, an index into the class names, if it has any.

        Raises:
            ValueError: if the image cannot be read.
        """
        row = self.rows[index]
        path, content = row["image"]["path"], row["image"]["bytes"]
        try:
            image = read_image(path if content is None else content, row.get("banner", 0))
        except ValueError as error:
            raise ValueError(f"row {index} of the data set: {error}") from error
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                entropy = np.random.SeedSequence([self.seed, self.epoch.item(), index])
                # not torch.manual_seed, which would also seed the accelerators, whose states are not forked here
                torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            sample: dict[str, torch.Tensor | int] = {"pixel_values": self.transform(image)}
        return {**sample, "labels": row["label"]} if "label" in row else sample
