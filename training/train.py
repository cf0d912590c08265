# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a multi-exit ViT and reports every exit.

    accelerate launch training/train.py demo.yaml [--learning_rate 1e-4 …]

Settings come from the YAML file, a path or one of `training/configs/`, and from options of the same names, which win.
With `--exit_layers 12 --uncertainty_weight 0` the same script trains the plain ViT, with `--architecture transfg`
TransFG. A run that was interrupted goes on from its last complete checkpoint when the same command is given again; one
that is finished gets what it lacks.
"""

import check_installed  # noqa: F401 (before what it looks for)


# isort: split

import logging
import sys
import timeit
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import DeiTImageProcessor, TrainerState, set_seed
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from arguments import DataArguments, ModelArguments, Run, RunArguments
from baselines.transfg import TransFGConfig, TransFGForImageClassification, TransFGTrainer
from modeling_mevit import ImageClassificationDataset, MEViTConfig, MEViTForImageClassification
from modeling_mevit.checkpoint import load_classifier
from modeling_mevit.configuration_mevit import validate_config_fields
from modeling_mevit.data.datasets import load_splits
from modeling_mevit.data.identity import encode_digests
from modeling_mevit.data.image_processing import evaluation_transform, image_processor_for, train_transform
from modeling_mevit.hub import locate
from modeling_mevit.trainer import MEViTTrainer, get_last_checkpoint, load_checkpoint, training_is_complete
from modeling_mevit.training_args import MEViTTrainingArguments
from run_results import steps_written, write_results
from settings import SettingsParser, split_config


logger = logging.getLogger(__name__)

SLOW = 1.5  # times as long as in float32: not the noise of one measurement


def settings_parser() -> SettingsParser:
    """The parser of all settings of a run."""
    return SettingsParser((ModelArguments, DataArguments, MEViTTrainingArguments), "train.py")


def parse(argv: list[str]) -> RunArguments:
    """Reads `[CONFIG.yaml] [--option value …]`."""
    settings, options = split_config(argv)
    return RunArguments(*settings_parser().parse(options, settings))


def prepare(arguments: RunArguments) -> Run:
    """Data, image processor, model and trainer, from the arguments. All are checked before anything is written."""
    data, training = arguments.data, arguments.training
    resumed = training.resume_from_checkpoint
    if resumed and not Path(resumed, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint must be a checkpoint with trainer_state.json, got {resumed}")
    image_processor = make_image_processor(arguments)
    set_seed(training.seed)
    splits = load_splits(
        data.dataset,
        image_column=data.image_column,
        label_column=data.label_column,
        selection_fraction=data.selection_fraction,
    )
    model = make_model(arguments, splits["train"].features["label"].names)

    testing = evaluation_transform(image_processor)
    augmented = train_transform(image_processor, data.auto_augment, data.min_crop_area)
    trainer_class = MEViTTrainer if arguments.model.architecture == "mevit" else TransFGTrainer
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=ImageClassificationDataset(splits["train"], augmented, seed=training.seed),
        eval_dataset=ImageClassificationDataset(splits["validation"], testing),
        processing_class=image_processor,
        optimizer_cls_and_kwargs=sgd_with_arguments(training),
    )
    choosing = data.selection_fraction > 0
    return Run(arguments, trainer, None if choosing else ImageClassificationDataset(splits["test"], testing))


def make_image_processor(arguments: RunArguments) -> DeiTImageProcessor:
    """The test transform, saved with the checkpoint, in the mean and standard deviation of backbone or ImageNet."""
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if arguments.model.backbone:
        own, _ = ImageProcessingMixin.get_image_processor_dict(locate(arguments.model.backbone))
        if "image_mean" not in own or "image_std" not in own:
            raise ValueError(f"the image processor of {arguments.model.backbone} must have image_mean and image_std")
        mean, std = own["image_mean"], own["image_std"]
    data = arguments.data
    return image_processor_for(data.image_size, image_mean=mean, image_std=std, resize_size=data.resize_size)


def make_model(
    arguments: RunArguments, class_names: list[str]
) -> MEViTForImageClassification | TransFGForImageClassification:
    """A new model on the weights of the backbone, or on random ones where there is none."""
    further_fields = arguments.model.model_config or {}
    settings = {
        "image_size": arguments.data.image_size,
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
        **further_fields,
    }
    model_class, config_class = TransFGForImageClassification, TransFGConfig
    if arguments.model.architecture == "mevit":
        model_class, config_class = MEViTForImageClassification, MEViTConfig
        settings = {"exit_layers": arguments.model.exit_layers, **settings}
    validate_config_fields(config_class, further_fields)
    if arguments.model.backbone:
        return model_class.from_vit(locate(arguments.model.backbone), **settings)
    return model_class(config_class(**settings))


def sgd_with_arguments(training: MEViTTrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """SGD with what `optim_args` say, `momentum=0.9` say, which Transformers ignores for SGD; None for others."""
    if training.optim != "sgd" or not training.optim_args:
        return None
    pairs = (pair.split("=") for pair in training.optim_args.replace(" ", "").split(","))
    return torch.optim.SGD, {"lr": training.learning_rate, **{name: yaml.safe_load(value) for name, value in pairs}}


def remember_training_images(trainer: MEViTTrainer) -> None:
    """Puts the digests of the training images into a MEViT's config, so that all its checkpoints hold them.

    Those that trained the checkpoint that it started from are there already, and stay.
    """
    config = trainer.model.config
    if isinstance(config, MEViTConfig):
        config.training_images = encode_digests(trainer.train_dataset.image_hashes, config.training_images or "")


def check_shared(trainer: MEViTTrainer, checkpoint: str | None) -> None:
    """Checks that all processes go on from the same step: otherwise they would wait for each other for ever.

    Raises:
        ValueError: where they do not, since they run on machines with output directories of their own.
    """
    step = -1
    if checkpoint:
        step = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).global_step
    steps = trainer.accelerator.gather(torch.tensor([step], device=trainer.args.device)).tolist()
    if len(set(steps)) > 1:
        found = ", ".join("none" if step < 0 else str(step) for step in steps)
        raise ValueError(
            f"output_dir must be on a file system that all machines share, to go on from a checkpoint there; the "
            f"steps of those that the processes found in {trainer.args.output_dir} are {found}"
        )


def slowdown_of_bfloat16() -> float:
    """How many times as long as in float32 a product of matrices takes in bfloat16 on this processor."""
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)  # not drawn, which would change what is drawn later
        times.append(min(timeit.repeat(lambda matrix=matrix: matrix @ matrix, number=1, repeat=3)))
    return times[1] / times[0]


def warn_of_slow_bfloat16(trainer: MEViTTrainer) -> None:
    """Says so where mixed precision makes training slower: on processors without instructions for bfloat16."""
    is_concerned = trainer.args.device.type == "cpu" and trainer.accelerator.mixed_precision == "bf16"
    if not is_concerned or not trainer.is_world_process_zero():
        return
    if (slowdown := slowdown_of_bfloat16()) > SLOW:
        logger.warning(
            "products of matrices take %.1f times as long in bfloat16 as in float32 on this processor; "
            "`accelerate launch --mixed_precision no` trains in float32",
            slowdown,
        )


def run(prepared: Run) -> dict[str, Any] | None:
    """Trains what [`prepare`] made, evaluates it, and writes everything, or what a finished run lacks.

    Returns:
        What `metrics.json` holds; None in processes beside the main one.
    """
    trainer, arguments = prepared.trainer, prepared.arguments.training
    output = Path(arguments.output_dir)
    checkpoint = arguments.resume_from_checkpoint or get_last_checkpoint(arguments.output_dir)
    check_shared(trainer, checkpoint)
    seconds = None  # known of a run that was not interrupted
    is_finished = bool(checkpoint) and training_is_complete(checkpoint, arguments)
    if is_finished:
        # Transformers would take one more step
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    else:
        remember_training_images(trainer)
        warn_of_slow_bfloat16(trainer)
        training = trainer.train(resume_from_checkpoint=checkpoint)
        seconds = None if checkpoint else training.metrics["train_runtime"]

    # `trainer_state.json` is written last: one of another step is left from a shorter training
    is_written = is_finished and steps_written(output) == trainer.state.global_step
    if not is_written or not (output / "model.safetensors").is_file():
        if is_finished:
            remember_training_images(trainer)
            load_checkpoint(trainer.model, trainer.state.best_model_checkpoint or checkpoint)
        trainer.save_model(_internal_call=True)  # without a push
    metrics = write_results(prepared, seconds, only_missing=is_written) if trainer.is_world_process_zero() else None
    trainer.accelerator.wait_for_everyone()
    if arguments.push_to_hub:
        trainer.model = load_classifier(arguments.output_dir, str(arguments.device))  # calibrated since, perhaps
        trainer.push_to_hub()
    return metrics


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Trains, evaluates and writes everything to the output directory; see [`run`]."""
    return run(prepare(parse(sys.argv[1:] if argv is None else argv)))


def command_line() -> None:
    """[`main`] that ends with one line where the input was bad. What fails later keeps its traceback."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        prepared = prepare(parse(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    run(prepared)


if __name__ == "__main__":
    command_line()
