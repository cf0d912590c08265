# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Sandwich-rule training with in-place distillation: one forward and one backward pass a step, for all exits.

[`FineTuningTrainer`] is what any fine-tuned ViT needs here, [`MEViTTrainer`] adds the rule.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from modeling_mevit.loss_mevit import cross_entropy, distillation_loss, uncertainty_loss, uncertainty_target
from modeling_mevit.exit_initialization import standardize_exits


logger = logging.getLogger(__name__)

IMAGES_TO_STANDARDIZE = 1024


@dataclass
class MEViTTrainingArguments(TrainingArguments):
    """The library's training arguments, and those of the sandwich rule. Defaults are the paper's."""

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
    uncertainty_reaches_backbone: bool = field(
        default=True,
        metadata={"help": "Whether the uncertainty loss moves exits and backbone too, or its predictor alone."},
    )

    exit_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of exits and predictors; `learning_rate`, the backbone's, by default."},
    )
    standardize_exits: bool = field(
        default=False,
        metadata={"help": "Whether what each exit's classifier reads is standardised over images before training."},
    )
    sgd_momentum: float = field(default=0.9, metadata={"help": "Momentum with `optim: sgd`, whose default has none."})

    def __post_init__(self):
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every step gives every parameter a gradient
        super().__post_init__()
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is no part of this loss; allowed is 0."
            )
        if self.num_random_exits < 0:
            raise ValueError(f"num_random_exits={self.num_random_exits} is negative; allowed are 0 and more.")
        for name in ("distillation_weight", "uncertainty_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; allowed are 0 and more.")
        if self.exit_learning_rate is not None and self.exit_learning_rate < 0:
            raise ValueError(f"exit_learning_rate={self.exit_learning_rate} is negative; allowed are 0 and more.")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature={self.distillation_temperature} is not above 0.")


def draw_exits(num_exits: int, num_random: int, seed: int, step: int) -> Tensor:
    """The exits that a step updates by the sandwich rule: the last, the earliest, and `num_random` others.

    The draw depends on `seed` and `step` alone, so that all processes agree and a resumed run goes on as it was.

    Returns:
        (num_exits,), float32: 1 for an exit that is updated, else 0.
    """
    drawn = torch.zeros(num_exits)
    drawn[0] = drawn[-1] = 1
    between = np.arange(1, num_exits - 1)
    drawn[np.random.default_rng([seed, step]).permutation(between)[:num_random]] = 1
    return drawn


def predicted_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """What evaluation keeps: the arg-max (B, E) of the exits' logits (B, E, L), or (B, 1) of one exit's (B, L)."""
    return logits.argmax(-1).view(len(logits), -1)


class SetEpochCallback(TrainerCallback):
    """Tells the training set which epoch begins, since its augmentation is a function of the epoch."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch))


class FineTuningTrainer(Trainer):
    """A [`Trainer`] for a ViT with new classifiers: one learning rate for these and one for the backbone, `vit`.

    Classifiers that `config.exit_layers` names can be started from standardised states. Evaluation gives
    `compute_metrics` predictions (B, E). Checkpoints are read as whole models, so that sharded ones (FSDP, DeepSpeed)
    cannot be resumed.
    """

    args: MEViTTrainingArguments

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("preprocess_logits_for_metrics", predicted_labels)
        super().__init__(*args, **kwargs)
        if self.model_init is not None and self.args.standardize_exits:
            raise ValueError("standardize_exits sets the norms of a model; give `model` in place of `model_init`.")
        # Set this once there is something to report; until then the card is the library's draft.
        self.write_model_card: Callable[[], None] | None = None
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(SetEpochCallback(self.train_dataset))

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim == OptimizerNames.SGD:
            settings["momentum"] = args.sgd_momentum
        return optimizer, settings

    def create_optimizer(self, *args, **kwargs):
        """The library's optimizer, with groups of their own for what is not the backbone, at `exit_learning_rate`."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.exit_learning_rate is not None:
            backbone = {id(parameter) for parameter in self.model.vit.parameters()}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) not in backbone]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in backbone]
                optimizer.add_param_group({**group, "params": own, "lr": self.args.exit_learning_rate})
        return optimizer

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        is_fresh = not resume_from_checkpoint and self.state.global_step == 0
        if self.args.standardize_exits and is_fresh:
            standardize_exits(self.model, self._some_images())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _some_images(self) -> Iterator[Tensor]:
        """Batches of training images, drawn by the seed alone; the global random state stays as it is."""
        generator = torch.Generator().manual_seed(self.args.seed)
        drawn = torch.randperm(len(self.train_dataset), generator=generator)[:IMAGES_TO_STANDARDIZE]
        images = DataLoader(
            Subset(self.train_dataset, drawn.tolist()),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            generator=generator,
        )
        with torch.random.fork_rng(devices=[]):
            for batch in images:
                yield batch["pixel_values"].to(self.args.device)

    def leave_mixed_precision(self) -> None:
        """From here on the model runs in its own precision, as it will where it is loaded. For after training."""
        self.accelerator.native_amp = False
        self.use_cpu_amp = False  # the same switch of Transformers 4 on CPU
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the card of `write_model_card` instead of the library's draft."""
        if self.write_model_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_model_card()

    # Transformers 5 renames a ViT's weights while loading. Its Trainer reads checkpoints without that step and leaves
    # what it does not recognise as it is, so reading goes through `from_pretrained` here, and is strict.

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_checkpoint(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        load_checkpoint(self.model, self.state.best_model_checkpoint)


class MEViTTrainer(FineTuningTrainer):
    """A [`FineTuningTrainer`] whose steps follow the sandwich rule.

    In each step the last exit learns from labels, the earliest exit and some drawn ones learn from labels and from the
    last exit of the same pass. The loss is the sum over these exits of their batch means:
    `Σ_i CE_i + λ_u · MSE_i + [i < n] · λ_d · KL_i`. Every exit is computed in every step and those not drawn are
    multiplied by 0, so that no parameter is ever without gradient and distributed training needs no search for unused
    ones.

    Evaluation predicts with every exit.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func would replace the loss that MEViTTrainer is for; allowed is None.")
        self._sum_of_terms, self._num_terms = 0.0, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)

        inputs = dict(inputs)
        labels = inputs.pop("labels")
        self.model.uncertainty_reaches_backbone = self.args.uncertainty_reaches_backbone
        outputs = model(**inputs)
        label_loss = cross_entropy(outputs.exit_logits, labels)
        target = uncertainty_target(outputs.exit_logits, labels, self.model.config.uncertainty_target)
        divergence = distillation_loss(outputs.exit_logits, self.args.distillation_temperature)
        terms = torch.stack(  # (3, E)
            (
                label_loss,
                uncertainty_loss(outputs.exit_uncertainty, target),
                F.pad(divergence, (0, 1)),  # the last exit is the teacher
            )
        )
        self._sum_of_terms, self._num_terms = self._sum_of_terms + terms.detach(), self._num_terms + 1

        weights = terms.new_tensor([1.0, self.args.uncertainty_weight, self.args.distillation_weight])
        drawn = draw_exits(terms.shape[1], self.args.num_random_exits, self.args.seed, self.state.global_step)
        loss = (weights[:, None] * terms * drawn.to(terms.device)).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Runs all exits and keeps their logits, where the library's Trainer would keep those of the last one."""
        inputs = {**inputs, "early_exit": False}
        ignored = {"logits", *self.model.config.keys_to_ignore_at_inference} - {"exit_logits"}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys or list(ignored))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the mean of each loss term of each exit since the last log: `loss_cross_entropy/exit_6` and so on."""
        if "loss" in logs and self._num_terms:
            terms = self.accelerator.reduce(self._sum_of_terms / self._num_terms, reduction="mean").tolist()
            self._sum_of_terms, self._num_terms = 0.0, 0
            exit_layers = self.model.config.exit_layers
            for name, values in zip(("cross_entropy", "uncertainty", "distillation"), terms, strict=True):
                layers = exit_layers[:-1] if name == "distillation" else exit_layers
                logs |= {f"loss_{name}/exit_{layer}": value for layer, value in zip(layers, values, strict=False)}
        super().log(logs, *args, **kwargs)


def load_checkpoint(model: torch.nn.Module, checkpoint: str) -> None:
    """Fills `model` with the weights of a checkpoint directory of its own class and shape.

    Raises:
        ValueError: where the file cannot be read, or a weight is missing, left over or of another shape.
    """
    try:
        loaded, loading = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=model.dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} cannot be loaded into the model: {error}") from error
    wrong = [
        f"{len(keys)} {kind.replace('_', ' ')}, first {min(map(str, keys))}" for kind, keys in loading.items() if keys
    ]
    if wrong:
        raise ValueError(f"{checkpoint} is of another model: {'; '.join(wrong)}.")
    model.load_state_dict(loaded.state_dict())


def get_last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a directory that was written to its end, or None.

    The Trainer writes `trainer_state.json` last: a directory without a whole one was interrupted and is passed over.
    """
    checkpoints = {path.name.split("-")[-1]: path for path in Path(output_dir).glob("checkpoint-*")}
    for step in sorted((int(step) for step in checkpoints if step.isdigit()), reverse=True):
        checkpoint = checkpoints[str(step)]
        try:
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            return str(checkpoint)
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s was not written to its end and is passed over", checkpoint)
    return None
