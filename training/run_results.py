# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run of `train.py` writes about itself: metrics, predictions, the training curve and the card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arguments import Run, RunArguments
from baselines.transfg import TransFGForImageClassification, predict
from modeling_mevit import MEViTForImageClassification
from modeling_mevit.checkpoint import load_classifier
from modeling_mevit.data.identity import is_local, public_name
from modeling_mevit.early_exit.cost import exit_parameters, relative_cost, static_exit_costs
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.figures import training_curve
from modeling_mevit.reports.tables import results_table


SANDWICH_SETTINGS = ["num_random_exits", "distillation_weight", "uncertainty_weight", "distillation_temperature"]
BANNER_NOTE = "cut off below each image, before the image processor"


def settings_of(arguments: RunArguments) -> dict[str, Any]:
    """The arguments that decide the result, by the names of the options; those that are None are left out."""
    model, data, training = arguments.model, arguments.data, arguments.training
    is_mevit = model.architecture == "mevit"
    training_settings = [
        "max_steps" if training.max_steps > 0 else "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "optim_args",
        "learning_rate",
        "exit_learning_rate",
        "standardize_exits",
        "weight_decay",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        *(SANDWICH_SETTINGS if is_mevit else []),
        "load_best_model_at_end",
        "seed",
    ]
    values = training.to_dict()
    settings = {
        **asdict(model),
        "license": None,  # decides no result
        "exit_layers": model.exit_layers if is_mevit else None,
        "backbone": public_name(model.backbone) if model.backbone else None,
        **asdict(data),
        "dataset": public_name(data.dataset),
        **{name: values[name] for name in training_settings},
    }
    return {name: value for name, value in settings.items() if value is not None}


def recipe_of(run: Run) -> dict[str, Any]:
    """[`settings_of`], and what launch and data add; `banner` notes what the data's layout adds."""
    trainer = run.trainer
    recipe = {
        **settings_of(run.arguments),
        "num_processes": trainer.args.world_size,
        "mixed_precision": trainer.accelerator.mixed_precision,
    }
    if "banner" in trainer.train_dataset.rows.column_names:
        recipe["banner"] = BANNER_NOTE
    return recipe


def card_of(run: Run) -> dict[str, Any]:
    """What the model card says and no other part of `metrics.json` does."""
    model, data = run.arguments.model, run.arguments.data
    return {
        # the Trainer knows the whole id, owner included, once it has made the repository
        "model_name": run.trainer.hub_model_id or Path(run.trainer.args.output_dir).resolve().name,
        "license": model.license,
        "dataset_on_hub": data.dataset != "demo" and not is_local(data.dataset),
        "base_model": public_name(model.backbone) if model.backbone else None,
        "base_model_on_hub": bool(model.backbone) and not is_local(model.backbone),
    }


def predict_splits(
    run: Run, model: MEViTForImageClassification | TransFGForImageClassification
) -> dict[str, ExitPredictions]:
    """Predictions of every exit on validation and, unless the run is to choose a recipe, on test."""
    arguments = run.arguments.training
    datasets = {"validation": run.trainer.eval_dataset} | ({"test": run.test_set} if run.test_set is not None else {})
    predict_all = predict_exits if isinstance(model, MEViTForImageClassification) else predict
    return {
        split: predict_all(
            model,
            dataset,
            batch_size=arguments.per_device_eval_batch_size,
            num_workers=arguments.dataloader_num_workers,
        )
        for split, dataset in datasets.items()
    }


def metrics_of(
    run: Run,
    model: MEViTForImageClassification | TransFGForImageClassification,
    predictions: dict[str, ExitPredictions],
    seconds: float | None,
) -> dict[str, Any]:
    """What `metrics.json` holds.

    Args:
        run: that was trained.
        model: that was saved; its exits may be combined otherwise since.
        predictions: of [`predict_splits`], by that model.
        seconds: that the training took; None of a run that was interrupted.
    """
    config = model.config
    combination = {}
    if isinstance(model, MEViTForImageClassification):
        costs, parameters = static_exit_costs(config), exit_parameters(config)
        combination = {"exit_combination": config.exit_combination}
    else:
        (last,) = config.exit_layers
        costs, parameters = {last: relative_cost(type(model), config)}, {last: model.num_parameters()}
    accuracies = {split: predicted.correct.mean(0).tolist() for split, predicted in predictions.items()}
    return {
        "dataset": public_name(run.arguments.data.dataset),
        "num_samples": {
            "train": len(run.trainer.train_dataset),
            **{split: len(predicted) for split, predicted in predictions.items()},
        },
        "exits": [
            {
                "exit": layer,
                **{f"{split}_accuracy": accuracy[place] for split, accuracy in accuracies.items()},
                "cost": costs[layer],
                "parameters": parameters[layer],
            }
            for place, layer in enumerate(config.exit_layers)
        ],
        **combination,
        "training_seconds": seconds,
        "recipe": recipe_of(run),
        "card": card_of(run),
        "environment": environment_info(),
    }


def write_results(run: Run, seconds: float | None, only_missing: bool) -> dict[str, Any]:
    """Evaluates the model that was saved, writes everything beside it, and prints the table of the exits.

    Args:
        run: that was trained and whose model was saved.
        seconds: see [`metrics_of`].
        only_missing: whether files that are there stay as they are.

    Returns:
        What `metrics.json` holds.
    """
    trainer, output = run.trainer, Path(run.arguments.training.output_dir)

    def is_due(name: str) -> bool:
        return not only_missing or not (output / name).is_file()

    metrics_are_due = is_due("metrics.json")
    splits = ["validation"] if run.test_set is None else ["validation", "test"]
    if any(is_due(name) for name in ("metrics.json", *(f"{split}_predictions.json" for split in splits))):
        model = load_classifier(str(output), str(trainer.args.device))
        predictions = predict_splits(run, model)
        for split, predicted in predictions.items():
            if is_due(f"{split}_predictions.json"):
                write_predictions(output / f"{split}_predictions.json", predicted)
        if metrics_are_due:
            write_json(output / "metrics.json", metrics_of(run, model, predictions, seconds), indent=2)
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    card = card_of(run)
    is_renamed = metrics.get("card") != card  # pushed later than it was trained, say
    if is_renamed:
        metrics["card"] = card
        write_json(output / "metrics.json", metrics, indent=2)
    if is_due("training_curve.png"):
        figure = training_curve(trainer.state.log_history, trainer.model.config.exit_layers)
        figure.savefig(output / "training_curve.png", dpi=120)
    if is_due("README.md") or metrics_are_due or is_renamed:
        trainer.create_model_card()
    if is_due("trainer_state.json"):
        trainer.save_state()
    print(f"\n{results_table(metrics['exits'])}\n\nEverything is in {output}.")
    return metrics


def write_predictions(file: Path, predicted: ExitPredictions) -> None:
    """Writes what every exit predicts of every image of a split, and the labels."""
    content = {"exit_layers": predicted.exit_layers, "labels": predicted.labels.tolist()}
    write_json(file, {**content, "predictions": predicted.predictions.tolist()})


def steps_written(output: Path) -> int | None:
    """Steps of the training whose results a directory holds in full; None where there are none."""
    file = output / "trainer_state.json"  # [`write_results`] writes it last
    return json.loads(file.read_text(encoding="utf-8"))["global_step"] if file.is_file() else None


def write_json(file: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Writes a whole file, or none."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    partial.replace(file)
