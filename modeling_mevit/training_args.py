# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`MEViTTrainer`]: those of a [`TrainingArguments`], and those of the sandwich rule."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy


_NOT_NEGATIVE = (
    "num_random_exits",
    "distillation_weight",
    "uncertainty_weight",
    "exit_learning_rate",
    "warmup_steps",
)
_PRIVATE = ("hub_token", "push_to_hub_token", "output_dir", "logging_dir", "resume_from_checkpoint", "deepspeed")


@dataclass
class MEViTTrainingArguments(TrainingArguments):
    """Transformers' training arguments, and those of the sandwich rule. Defaults are the paper's.

    Args:
        num_random_exits: exits drawn at random in each step, besides the earliest and the last one.
        distillation_weight: of the early exits' divergence from the last exit (equation 5).
        uncertainty_weight: of the squared error of the predicted uncertainty (equation 2).
        distillation_temperature: T of the softmax; the divergence is multiplied by T².
        exit_learning_rate: of exits and uncertainty predictor; by default `learning_rate`, the backbone's.
        standardize_exits: whether what each exit's classifier reads is standardised over training images before
            training.
        warmup_steps: as Transformers 5 reads it in both of its major versions: a number below 1 is a fraction of all
            steps.

    Raises:
        ValueError: if an argument makes no sense; the message names it, what was given and what is allowed.
    """

    num_random_exits: int = field(
        default=2,
        metadata={
            "help": "Exits drawn at random in each step, besides the earliest and the last one (k of the rule)."
        },
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Weight of the early exits' divergence from the last exit (equation 5)."}
    )
    uncertainty_weight: float = field(
        default=1.0, metadata={"help": "Weight of the squared error of the predicted uncertainty (equation 2)."}
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={"help": "Softmax temperature T of the distillation; the divergence is multiplied by T²."},
    )
    exit_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of exits and predictor; `learning_rate`, the backbone's, by default."},
    )
    standardize_exits: bool = field(
        default=False,
        metadata={"help": "Whether what each exit's classifier reads is standardised over images before training."},
    )
    warmup_steps: float = field(
        default=0, metadata={"help": "Steps of linear warm-up; a number below 1 is a fraction of all steps."}
    )

    def __post_init__(self) -> None:
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = False  # every step gives every parameter a gradient
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn that there is nothing to pin it for
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        # Transformers 4 checks that this is a whole number of steps
        warmup = self.warmup_steps
        is_fraction = 0 < warmup < 1
        self.warmup_steps = 0 if is_fraction else int(warmup)
        super().__post_init__()
        if is_fraction:
            self.warmup_steps = warmup
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, since this loss has none, got {self.label_smoothing_factor}"
            )
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be above 0, got {self.distillation_temperature}")
        if self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy must be 'end' or 'every_save', since the states of a training stay on this machine, "
                f"got {self.hub_strategy.value!r}"
            )

    def without_private_fields(self) -> "MEViTTrainingArguments":
        """A copy to be written to a file: without tokens and paths; of a run name that is a path, its last part."""
        public = copy.copy(self)
        for name in vars(public).keys() & set(_PRIVATE):
            setattr(public, name, None)
        if public.run_name:
            public.run_name = Path(public.run_name).name
        return public

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps over which the learning rate rises from 0, of a training of `num_training_steps`."""
        if 0 < self.warmup_steps < 1:
            return math.ceil(num_training_steps * self.warmup_steps)
        return super().get_warmup_steps(num_training_steps)
