# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Sandwich-rule training with in-place distillation: one forward and one backward pass a step, for all exits."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalPrediction, HubStrategy
from transformers.utils import PushInProgress

from ._extras import missing_for_training
from .exit_initialization import standardize_exits
from .exit_policy_mevit import combine_exits
from .loss_mevit import cross_entropy, distillation_loss, uncertainty_loss, uncertainty_target
from .reports.model_card import write_card
from .training_args import MEViTTrainingArguments


if _message := missing_for_training(("accelerate", "datasets", "evaluate")):
    raise ImportError(_message)

import datasets
import evaluate


logger = logging.getLogger(__name__)

IMAGES_TO_STANDARDIZE = 1024
# What is uploaded of an output directory: the model, its code, its image processor, its card, and the results and
# figures that the card is made of. Anything else stays: states of a training, logs, what trackers leave.
PUBLIC_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "*_mevit.py"),
    *("preprocessor_config.json", "processor_config.json", "README.md"),
    *("metrics.json", "evaluation.json", "evaluation.md", "*_predictions.json", "*.png"),
)
_SUBDIRECTORIES = "*/*"  # "*" stands for "/" too


class ExitAccuracy(evaluate.Metric):
    """Share of samples that each exit gets right. N samples, E exits in ascending order.

    `compute(predictions=(N, E), references=(N,), exit_layers=[…])` gives `accuracy/exit_k` for each exit k, and
    `accuracy`, that of the last one. It needs no network.
    """

    def __init__(self, **kwargs: Any):
        # each process of a distributed run computes on what was gathered; none needs a file for it
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of every exit of a multi-exit classifier.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self, predictions: list[list[int]], references: list[int], exit_layers: list[int]
    ) -> dict[str, float]:
        accuracies = (np.asarray(predictions) == np.asarray(references)[:, None]).mean(0).tolist()  # E numbers
        per_exit = {f"accuracy/exit_{layer}": value for layer, value in zip(exit_layers, accuracies, strict=True)}
        return {"accuracy": accuracies[-1], **per_exit}


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

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(int(state.epoch))


class MEViTTrainer(Trainer):
    """A [`Trainer`] whose steps follow the sandwich rule.

    In each step the last exit learns from labels, the earliest exit and some drawn ones learn from labels and from the
    last exit of the same pass. The loss is the sum over these exits of their batch means:
    `Σ_i CE_i + λ_u · MSE_i + [i < n] · λ_d · KL_i`. Every exit is computed in every step and those not drawn are
    multiplied by 0, so that no parameter is ever without gradient and distributed training needs no search for unused
    ones.

    What is not the backbone, `model.vit`, has a learning rate of its own, and exits can be started from standardised
    states. Evaluation predicts with every exit, and by default reports the accuracy of each ([`ExitAccuracy`]).
    Checkpoints are read as whole models, so that sharded ones (FSDP, DeepSpeed) cannot be resumed.

    What is pushed to the Hub is the model, its code, its card and results: files that a pattern of `PUBLIC_FILES`
    matches.

    Args:
        args, kwargs: those of [`Trainer`]; `args` is a [`MEViTTrainingArguments`].

    Raises:
        ValueError: if `compute_loss_func` is given, or `model_init` together with `standardize_exits`.
    """

    args: MEViTTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("preprocess_logits_for_metrics", predicted_labels)
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func must be None, since it would replace the loss of MEViTTrainer")
        if self.model_init is not None and self.args.standardize_exits:
            raise ValueError("standardize_exits sets the norms of a model; give `model` in place of `model_init`")
        if self.compute_metrics is None:  # type: ignore[has-type]
            self.compute_metrics = self.exit_accuracy
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(SetEpochCallback(self.train_dataset))
        self._sum_of_terms: Tensor | float = 0.0
        self._num_terms = 0

    def exit_accuracy(self, evaluation: EvalPrediction) -> dict[str, float]:
        """Accuracy of every exit, from predictions (N, E) and labels (N,): what `compute_metrics` is by default."""
        return ExitAccuracy().compute(
            predictions=evaluation.predictions,
            references=evaluation.label_ids,
            exit_layers=self.model.config.exit_layers,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of [`Trainer`], with groups of their own for what is not backbone, at `exit_learning_rate`."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.exit_learning_rate is not None:
            backbone = {id(parameter) for parameter in self.model.vit.parameters()}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) not in backbone]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in backbone]
                optimizer.add_param_group({**group, "params": own, "lr": self.args.exit_learning_rate})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as [`Trainer.train`] does; exits are standardised first, unless training goes on from somewhere."""
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a step by the sandwich rule, a scalar; the model's own in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)

        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        label_loss = cross_entropy(outputs.exit_logits, labels)
        target = uncertainty_target(outputs.exit_logits, labels)
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

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Runs all exits and keeps what they predict with, where [`Trainer`] would keep the last one's logits."""
        inputs = {**inputs, "early_exit": False}
        ignored = {"logits", *self.model.config.keys_to_ignore_at_inference} - {"exit_logits"}
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys or list(ignored)
        )
        if logits is not None and not ignore_keys:
            logits = combine_exits(self.model.config.exit_combination, logits)
        return loss, logits, labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each loss term of each exit since the last log: `loss_cross_entropy/exit_6` and so on."""
        if "loss" in logs and self._num_terms:
            terms = self.accelerator.reduce(self._sum_of_terms / self._num_terms, reduction="mean").tolist()
            self._sum_of_terms, self._num_terms = 0.0, 0
            exit_layers = self.model.config.exit_layers
            for name, values in zip(("cross_entropy", "uncertainty", "distillation"), terms, strict=True):
                layers = exit_layers[:-1] if name == "distillation" else exit_layers
                logs |= {f"loss_{name}/exit_{layer}": value for layer, value in zip(layers, values, strict=False)}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes `README.md`: rendered from `metrics.json` where there is one, else the draft of [`Trainer`]."""
        if not Path(self.args.output_dir, "metrics.json").is_file():
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_card(self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the model and uploads `output_dir`, as [`Trainer.push_to_hub`] does, but `PUBLIC_FILES` alone.

        Args:
            commit_message: of the commit.
            blocking: whether to return only when everything is uploaded.
            token: to write with; by default `hub_token`, and without one that of `hf auth login`.
            revision: branch to commit to; by default `hub_revision`.
            private: whether a repository that is not there yet is made a private one; by default `hub_private_repo`.
            kwargs: those of [`Trainer.create_model_card`].

        Returns:
            The commit, or a future of it if not `blocking`; None in processes beside the main one.
        """
        self._tell_that_a_push_begins()
        if private is not None:
            self.args.hub_private_repo = private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.create_model_card(**{"model_name": name.split("/")[-1], **kwargs})
        self._finish_current_push()
        return self._upload(commit_message, token=token, revision=revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        current: PushInProgress | None = self.push_in_progress  # type: ignore[has-type]
        under_way = [] if current is None or current.is_done() else current.jobs
        if under_way and not self.args.hub_always_push:
            return
        self._tell_that_a_push_begins()
        # copied, since the checkpoint may be deleted while it is being uploaded
        files = [file.name for file in Path(checkpoint_folder).iterdir() if file.is_file()]
        for name in filter_repo_objects(files, allow_patterns=list(PUBLIC_FILES)):
            shutil.copy(Path(checkpoint_folder, name), Path(self.args.output_dir, name))
        upload = self._upload(f"Training in progress, step {self.state.global_step}", run_as_future=True)
        self.push_in_progress = PushInProgress([*under_way, upload])

    def _tell_that_a_push_begins(self) -> None:
        if hasattr(self.callback_handler, "on_push_begin"):  # an event of Transformers 5
            self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def _upload(
        self, commit_message: str, *, run_as_future: bool, token: str | None = None, revision: str | None = None
    ) -> Any:
        return HfApi().upload_folder(  # type: ignore[call-overload]
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=run_as_future,
            allow_patterns=list(PUBLIC_FILES),
            ignore_patterns=_SUBDIRECTORIES,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Transformers pickles its arguments beside the model
        args, self.args = self.args, self.args.without_private_fields()
        try:
            super()._save(output_dir or args.output_dir, state_dict)
        finally:
            self.args = args

    # Transformers 5 renames a ViT's weights while loading. Its Trainer reads checkpoints without that step and leaves
    # what it does not recognise as it is, so reading goes through `from_pretrained` here, and is strict.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        load_checkpoint(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_checkpoint(self.model, self.state.best_model_checkpoint)


def load_checkpoint(model: PreTrainedModel, checkpoint: str) -> None:
    """Fills `model` with the weights of a checkpoint directory of its own class and shape.

    Raises:
        ValueError: if the file cannot be read, or a weight is missing, left over or of another shape.
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
        raise ValueError(f"{checkpoint} is of another model: {'; '.join(wrong)}")
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


def training_is_complete(checkpoint: str, args: TrainingArguments) -> bool:
    """Whether a checkpoint already is as far as the arguments want to train."""
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.epoch is not None and state.epoch >= args.num_train_epochs
