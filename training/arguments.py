# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The settings of `train.py`, and a run that they describe."""

from dataclasses import dataclass, field
from typing import Any, Literal

from modeling_mevit import ImageClassificationDataset
from modeling_mevit.trainer import MEViTTrainer
from modeling_mevit.training_args import MEViTTrainingArguments
from settings import as_mapping


@dataclass
class ModelArguments:
    """Which model, where it starts from, and where its exits are."""

    architecture: Literal["mevit", "transfg"] = field(
        default="mevit", metadata={"help": "'mevit', or 'transfg', which has one exit, to compare with."}
    )
    backbone: str | None = field(
        default=None,
        metadata={"help": "Local directory or Hub name of a pretrained ViT. Without one, weights start at random."},
    )
    exit_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers with an exit; the later half of the encoder by default. For 'mevit' alone."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the checkpoint for its card, as the Hub names it. Not for 'transfg'."},
    )
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of the model's config: a mapping, as JSON in an option."}
    )

    def __post_init__(self) -> None:
        self.model_config = as_mapping("model_config", self.model_config)


@dataclass
class DataArguments:
    """Which images, and how they become tensors."""

    dataset: str = field(
        default="demo",
        metadata={"help": "A folder (ImageFolder, Stanford Cars or FGVC-Aircraft layout), a Hub id, or 'demo'."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of a Hub data set with the images."})
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of a Hub data set with the labels. FGVC-Aircraft: 'family' or 'manufacturer'."},
    )
    selection_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Part of train moved to validation per class, to choose a recipe by; test is then not looked at."
        },
    )
    image_size: int = field(default=224, metadata={"help": "Side in pixels of what the model sees."})
    resize_size: int | None = field(
        default=None, metadata={"help": "Side in pixels to which images are resized before the crop; 600/448 of it."}
    )
    min_crop_area: float | None = field(
        default=None,
        metadata={
            "help": "Smallest share of an image's area in a training crop of random area and aspect ratio "
            "(RandomResizedCrop); without it, crops have the size of what the model sees."
        },
    )
    auto_augment: Literal["imagenet", "ta_wide"] | None = field(
        default=None, metadata={"help": "'imagenet': AutoAugment with its ImageNet policy; 'ta_wide': TrivialAugment."}
    )


@dataclass(frozen=True)
class RunArguments:
    """All settings of a run."""

    model: ModelArguments
    data: DataArguments
    training: MEViTTrainingArguments


@dataclass(frozen=True)
class Run:
    """A run that is ready to start; `test_set` is None for one that is to choose a recipe."""

    arguments: RunArguments
    trainer: MEViTTrainer
    test_set: ImageClassificationDataset | None
