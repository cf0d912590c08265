# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a multi-exit ViT and reports every exit.

    accelerate launch training/train.py training/configs/demo.yaml [--learning_rate 1e-4 …]

Settings come from the YAML file and from options of the same names, which win. With `--exit_layers 12
--uncertainty_weight 0` the same script trains the plain ViT, with `--architecture transfg` TransFG. A run that was
interrupted goes on from its last complete checkpoint when the same command is given again.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import DeiTImageProcessor, HfArgumentParser, TrainerState, set_seed
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.trainer_utils import EvalPrediction

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.configuration_mevit import validate_config_fields
from modeling_mevit.early_exit.cost import static_exit_costs, exit_parameters, relative_cost
from modeling_mevit.data import (
    ImageClassificationDataset,
    evaluation_transform,
    image_processor_for,
    is_local,
    load_splits,
    public_name,
    train_transform,
)
from modeling_mevit.reports.figures import training_curve
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.early_exit.metrics import ExitAccuracy
from modeling_mevit.reports.model_card import (
    EARLY_EXIT_HEADING,
    MEASURED_HEADING,
    model_card,
    results_table,
    section_of,
    with_section,
)
from baselines import TransFGConfig, TransFGForImageClassification
from modeling_mevit.trainer import (
    FineTuningTrainer,
    MEViTTrainer,
    MEViTTrainingArguments,
    get_last_checkpoint,
    load_checkpoint,
)


logger = logging.getLogger(__name__)

SANDWICH_SETTINGS = [
    "num_random_exits",
    "distillation_weight",
    "uncertainty_weight",
    "distillation_temperature",
    "uncertainty_reaches_backbone",
]
BANNER_NOTE = "cut off below each photo, before the image processor"


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
    model_config: str | None = field(
        default=None, metadata={"help": "Further fields of the model's config, as JSON (a mapping in the YAML file)."}
    )


@dataclass
class DataArguments:
    """Which images, and how they become tensors."""

    dataset: str = field(
        default="demo",
        metadata={"help": "A folder (ImageFolder, Stanford Cars or FGVC-Aircraft layout), a Hub id, or 'demo'."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of a Hub data set with the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of a Hub data set with the labels."})
    aircraft_level: str = field(
        default="variant", metadata={"help": "FGVC-Aircraft: 'variant', 'family' or 'manufacturer'."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Part of train held out per class where there is no validation split."}
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
    auto_augment: bool = field(default=False, metadata={"help": "Whether to apply AutoAugment (ImageNet policy)."})
    normalization: str = field(
        default="backbone",
        metadata={"help": "Mean and standard deviation of 'backbone' (its image processor) or of 'imagenet'."},
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, evaluates and writes everything to the output directory.

    Args:
        argv: `[CONFIG.yaml] [--option value …]`; the command line's by default.

    Returns:
        What `metrics.json` holds.
    """
    arguments = parse(argv)
    return run(*prepare(*arguments), *arguments)


def run(
    trainer: FineTuningTrainer,
    test_set: ImageClassificationDataset | None,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: MEViTTrainingArguments,
) -> dict[str, Any]:
    """Trains what [`prepare`] made, evaluates it, and writes everything. Returns what `metrics.json` holds."""
    checkpoint = training_arguments.resume_from_checkpoint or get_last_checkpoint(training_arguments.output_dir)
    seconds = None  # known of a run that was not interrupted
    finished = bool(checkpoint) and training_is_complete(checkpoint, training_arguments)
    if finished:
        # the library would take one more step
        logger.info("%s is the end of a run; it is evaluated again", checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        load_checkpoint(trainer.model, trainer.state.best_model_checkpoint or checkpoint)
    else:
        if checkpoint:
            logger.info("going on from %s", checkpoint)
        training = trainer.train(resume_from_checkpoint=checkpoint)
        seconds = None if checkpoint else training.metrics["train_runtime"]
    trainer.save_state()

    trainer.leave_mixed_precision()
    config = trainer.model.config
    measured = {"validation": trainer.predict(trainer.eval_dataset, metric_key_prefix="validation")}
    if test_set is not None:
        measured["test"] = trainer.predict(test_set, metric_key_prefix="test")
    has_exits = isinstance(trainer.model, MEViTForImageClassification)
    if has_exits:
        costs, parameters = static_exit_costs(config), exit_parameters(config)
    else:
        (last,) = config.exit_layers
        costs = {last: relative_cost(type(trainer.model), config)}
        parameters = {last: trainer.model.num_parameters()}
    metrics = {
        "dataset": public_name(data_arguments.dataset),
        "num_samples": {
            "train": len(trainer.train_dataset),
            **{split: len(output.label_ids) for split, output in measured.items()},
        },
        "exits": [
            {
                "exit": layer,
                **{
                    f"{split}_accuracy": output.metrics[f"{split}_accuracy/exit_{layer}"]
                    for split, output in measured.items()
                },
                "cost": costs[layer],
                "parameters": parameters[layer],
            }
            for layer in config.exit_layers
        ],
        "training_seconds": seconds,
        "recipe": recipe(trainer, model_arguments, data_arguments),
        "machine": machine(),
    }
    if has_exits:
        if finished:
            keep_calibration(config, training_arguments.output_dir)
        trainer.write_model_card = lambda: write_model_card(trainer, metrics, model_arguments, data_arguments)
    if trainer.is_world_process_zero():
        output = Path(training_arguments.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "metrics.json", metrics)
        for split, predicted in measured.items():
            write_json(
                output / f"{split}_predictions.json",
                {
                    "exit_layers": config.exit_layers,
                    "labels": predicted.label_ids.tolist(),
                    "predictions": predicted.predictions.tolist(),
                },
            )
        training_curve(trainer.state.log_history, config.exit_layers).savefig(output / "training_curve.png", dpi=120)
        print(f"\n{results_table(metrics['exits'])}\n\nEverything is in {output}.")

    trainer.save_model()
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    return metrics


def parse(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, MEViTTrainingArguments]:
    """Reads the YAML file, if one comes first, and then the options, which win."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, MEViTTrainingArguments),
        usage="train.py [CONFIG.yaml] [--option value …]   (--help lists the options)",
        allow_abbrev=False,
    )
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*options_of(argv[0]), *argv[1:]]
    *arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"{' '.join(unknown)} is no option of train.py; --help lists them.")
    return tuple(arguments)


def options_of(config_file: str) -> list[str]:
    """The settings of a YAML file as they would stand on the command line."""
    with open(config_file, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    if not isinstance(settings, dict):
        raise ValueError(f"{config_file} holds no mapping of settings to values.")
    return options_from(settings)


def options_from(settings: dict[str, Any]) -> list[str]:
    """Settings as they would stand on the command line; a mapping becomes JSON, None is left out."""
    options = []
    for name, value in settings.items():
        if isinstance(value, dict):
            options += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        elif value is not None:
            options += [f"--{name}", str(value)]
    return options


def prepare(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: MEViTTrainingArguments
) -> tuple[FineTuningTrainer, ImageClassificationDataset | None]:
    """Data, image processor, model and trainer, from the arguments. All are checked before anything is written.

    Returns:
        The trainer, and the test set; None for a run that is to choose a recipe.
    """
    resumed = training_arguments.resume_from_checkpoint
    if resumed and not Path(resumed, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={resumed} is no checkpoint of a run; it has no trainer_state.json.")
    set_seed(training_arguments.seed)
    splits = load_splits(
        data_arguments.dataset,
        image_column=data_arguments.image_column,
        label_column=data_arguments.label_column,
        aircraft_level=data_arguments.aircraft_level,
        validation_fraction=data_arguments.validation_fraction,
        selection_fraction=data_arguments.selection_fraction,
    )
    image_processor = make_image_processor(model_arguments, data_arguments)
    model = make_model(model_arguments, data_arguments.image_size, splits["train"].features["label"].names)

    testing = evaluation_transform(image_processor)
    train_set = ImageClassificationDataset(
        splits["train"], train_transform(image_processor, data_arguments.auto_augment), seed=training_arguments.seed
    )
    trainer_class = MEViTTrainer if model_arguments.architecture == "mevit" else FineTuningTrainer
    trainer = trainer_class(
        model=model,
        args=training_arguments,
        train_dataset=train_set,
        eval_dataset=ImageClassificationDataset(splits["validation"], testing),
        processing_class=image_processor,
        compute_metrics=accuracy_of(model.config.exit_layers),
    )
    choosing = data_arguments.selection_fraction > 0
    return trainer, None if choosing else ImageClassificationDataset(splits["test"], testing)


def make_image_processor(model_arguments: ModelArguments, data_arguments: DataArguments) -> DeiTImageProcessor:
    """The test transform, saved with the checkpoint, in the mean and standard deviation of backbone or ImageNet."""
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if data_arguments.normalization not in ("backbone", "imagenet"):
        raise ValueError(f"normalization={data_arguments.normalization!r} is neither 'backbone' nor 'imagenet'.")
    if data_arguments.normalization == "backbone" and model_arguments.backbone:
        try:
            own, _ = ImageProcessingMixin.get_image_processor_dict(model_arguments.backbone)
        except OSError as error:
            own = {}
            logger.debug("no image processor: %s", error)
        if "image_mean" not in own or "image_std" not in own:
            raise ValueError(
                f"{model_arguments.backbone} has no image processor that names mean and standard deviation; "
                f"give --normalization imagenet, or a backbone that has."
            )
        mean, std = own["image_mean"], own["image_std"]
    return image_processor_for(
        data_arguments.image_size, image_mean=mean, image_std=std, resize_size=data_arguments.resize_size
    )


def make_model(
    model_arguments: ModelArguments, image_size: int, class_names: list[str]
) -> MEViTForImageClassification | TransFGForImageClassification:
    """A new model on the weights of the backbone, or on random ones where there is none."""
    try:
        further_fields = json.loads(model_arguments.model_config or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"model_config={model_arguments.model_config} is no JSON: {error}") from error
    settings = {
        "image_size": image_size,
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
        **further_fields,
    }
    if model_arguments.architecture == "mevit":
        model_class, config_class = MEViTForImageClassification, MEViTConfig
        settings = {"exit_layers": model_arguments.exit_layers, **settings}
    else:
        model_class, config_class = TransFGForImageClassification, TransFGConfig
    validate_config_fields(config_class, further_fields)
    if model_arguments.backbone:
        return model_class.from_vit(model_arguments.backbone, **settings)
    return model_class(config_class(**settings))


def accuracy_of(exit_layers: list[int]):
    """A `compute_metrics` that gives the accuracy of every exit."""
    metric = ExitAccuracy()

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        return metric.compute(
            predictions=evaluation.predictions, references=evaluation.label_ids, exit_layers=exit_layers
        )

    return compute_metrics


def settings_of(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: MEViTTrainingArguments
) -> dict[str, Any]:
    """The arguments that decide the result, by the names of the options; those that are None are left out."""
    training_settings = [
        "max_steps" if training_arguments.max_steps > 0 else "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        *(["sgd_momentum"] if training_arguments.optim == "sgd" else []),
        "learning_rate",
        "exit_learning_rate",
        "standardize_exits",
        "weight_decay",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        *(SANDWICH_SETTINGS if model_arguments.architecture == "mevit" else []),
        "load_best_model_at_end",
        "seed",
    ]
    values = training_arguments.to_dict()
    settings = {
        **asdict(model_arguments),
        "license": None,  # decides no result
        "exit_layers": model_arguments.exit_layers if model_arguments.architecture == "mevit" else None,
        **asdict(data_arguments),
        "dataset": public_name(data_arguments.dataset),
        "backbone": public_name(model_arguments.backbone) if model_arguments.backbone else None,
        "aircraft_level": None,  # told where it means something
        **{name: values[name] for name in training_settings},
    }
    return {name: value for name, value in settings.items() if value is not None}


def recipe(
    trainer: FineTuningTrainer, model_arguments: ModelArguments, data_arguments: DataArguments
) -> dict[str, Any]:
    """[`settings_of`], and what launch and data add; `banner` notes what the data's layout adds."""
    settings = {
        **settings_of(model_arguments, data_arguments, trainer.args),
        "num_processes": trainer.args.world_size,
        "mixed_precision": trainer.accelerator.mixed_precision,
    }
    if "banner" in trainer.train_dataset.rows.column_names:
        settings |= {"aircraft_level": data_arguments.aircraft_level, "banner": BANNER_NOTE}
    return settings


def training_is_complete(checkpoint: str, training_arguments: MEViTTrainingArguments) -> bool:
    """Whether a checkpoint already is as far as the arguments want to train."""
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    if training_arguments.max_steps > 0:
        return state.global_step >= training_arguments.max_steps
    return state.epoch >= training_arguments.num_train_epochs


def keep_calibration(config: MEViTConfig, output_dir: str) -> None:
    """Takes over what `mevit calibrate` wrote to the config of a finished run, which is about to be written again."""
    if not Path(output_dir, "config.json").is_file():
        return
    stored = MEViTConfig.from_pretrained(output_dir)
    if stored.calibration is not None:
        for name in ("exit_policy", "exit_thresholds", "patience", "early_exit", "calibration"):
            setattr(config, name, getattr(stored, name))


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2 if file.name == "metrics.json" else None) + "\n", encoding="utf-8")


def write_model_card(
    trainer: FineTuningTrainer, metrics: dict[str, Any], model_arguments: ModelArguments, data_arguments: DataArguments
) -> None:
    """README.md of the output directory."""
    arguments = trainer.args
    backbone = model_arguments.backbone
    file = Path(arguments.output_dir, "README.md")
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    card = model_card(
        # the Trainer knows the whole id, owner included, once it has made the repository
        model_name=getattr(trainer, "hub_model_id", None) or Path(arguments.output_dir).resolve().name,
        dataset=metrics["dataset"],
        dataset_on_hub=data_arguments.dataset != "demo" and not is_local(data_arguments.dataset),
        base_model=metrics["recipe"].get("backbone"),
        base_model_on_hub=bool(backbone) and not is_local(backbone),
        num_labels=trainer.model.config.num_labels,
        metrics=metrics,
        recipe=metrics["recipe"],
        curve="training_curve.png",
        license=model_arguments.license,
    ).content
    if trainer.model.config.calibration is not None:
        for heading in (EARLY_EXIT_HEADING, MEASURED_HEADING):
            card = with_section(card, heading, section_of(before, heading))
    file.write_text(card, encoding="utf-8")


def command_line() -> None:
    """[`main`] that ends with one line where the input was bad. What fails later keeps its traceback."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        arguments = parse(None)
        prepared = prepare(*arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    run(*prepared, *arguments)


if __name__ == "__main__":
    command_line()
