# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What `compare.py` measures of trained runs, each of which is an output directory of `train.py`."""

import hashlib
import json
import string
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification

from arguments import DataArguments
from baselines import TransFGConfig, TransFGForImageClassification
from baselines.transfg import predict
from benchmarks.timing import median_ratio, times_in_turn
from compare_runs import correct_predictions, paired_interval
from modeling_mevit import DataSource, ImageClassificationDataset, MEViTConfig, MEViTForImageClassification
from modeling_mevit.checkpoint import load_image_processor
from modeling_mevit.data.datasets import load_splits
from modeling_mevit.data.identity import select_independent
from modeling_mevit.data.image_processing import denormalize, evaluation_transform
from modeling_mevit.early_exit.calibration import best_within_cost, shared_thresholds
from modeling_mevit.early_exit.cost import relative_cost, static_exit_costs
from modeling_mevit.early_exit.evaluation import class_changes
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from modeling_mevit.reports.attention import cls_attention, similarity_to_last
from modeling_mevit.reports.figures import attention_maps
from run_results import write_predictions


BUDGETS = np.linspace(0.45, 0.9, 10)  # mean costs that thresholds are chosen for
_DIGITS = string.digits + string.ascii_letters  # of the place of an exit
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cached(file: Path, depends_on: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute` gives, kept in a JSON file and computed anew only if what it depends on has changed."""
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["depends_on"] == json.loads(json.dumps(depends_on)):
            return kept["result"]
    partial = file.with_suffix(".partial")
    content = {"depends_on": depends_on, "result": compute()}
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))["result"]


def run_digest(directory: Path) -> str:
    """What tells a run from others: SHA-256 of what it predicts on test."""
    return hashlib.sha256((directory / "test_predictions.json").read_bytes()).hexdigest()


def load(directory: Path, attention: str | None = None) -> MEViTForImageClassification | TransFGForImageClassification:
    """The model of a run in eval mode, with its own implementation of attention or another."""
    options = {"attn_implementation": attention} if attention else {}
    return (
        AutoModelForImageClassification.from_pretrained(directory, trust_remote_code=False, **options)
        .to(DEVICE)
        .eval()
    )


def attention_of(directory: Path) -> str | None:
    """The implementation of attention that a run was trained with; None for Transformers' choice."""
    recipe = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["recipe"]
    return recipe.get("model_config", {}).get("attn_implementation")


def images_of(source: DataSource, directory: Path) -> ImageClassificationDataset:
    """Images as the model of a run sees them."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return source.load(config.label2id, load_image_processor(str(directory)))


def independent_predictions(
    model: MEViTForImageClassification, directory: Path, source: DataSource
) -> tuple[ExitPredictions, ExitPredictions]:
    """What every exit of a run's model predicts: on images that can calibrate it, each once and none that it was
    trained on, and on all of the source."""
    images = images_of(source, directory)
    kept, _, _ = select_independent(images.image_hashes, model.config.training_images)
    predictions = predict_exits(model, images)
    return predictions.select(np.array(kept)), predictions


def held_out_images(data: DataArguments, directory: Path) -> ImageClassificationDataset:
    """The validation images of a run's training, with those that `selection_fraction` moved there, as it saw them."""
    splits = load_splits(
        data.dataset,
        image_column=data.image_column,
        label_column=data.label_column,
        selection_fraction=data.selection_fraction,
    )
    return ImageClassificationDataset(splits["validation"], evaluation_transform(load_image_processor(str(directory))))


def ensure_tested(directory: Path, test: DataSource) -> None:
    """Predicts the test images with a run that was trained without looking at them, unless that is done."""
    file = directory / "test_predictions.json"
    if not file.is_file():
        model = load(directory)
        predict_all = predict_exits if isinstance(model, MEViTForImageClassification) else predict
        write_predictions(file, predict_all(model, images_of(test, directory)))


def model_costs(config: MEViTConfig, transfg: TransFGConfig | None = None) -> dict[str, dict[str, float]]:
    """Cost of plain ViT, every exit and TransFG as the papers count it, and as it is here, on the modules that run.

    The papers count whole layers, and TransFG by the product of the attention matrices.
    """
    published, here = static_exit_costs(config, full_last_layer=True), static_exit_costs(config)
    counted = {"vit": {name: relative_cost(ViTForImageClassification, config) for name in ("published", "here")}}
    counted |= {f"mevit_{layer}": {"published": published[layer], "here": here[layer]} for layer in here}
    if transfg is not None:
        settings = transfg.to_dict()
        settings.pop("model_type")
        by = {"published": "matrix_product", "here": "row"}
        counted[f"transfg_{transfg.num_hidden_layers}"] = {
            name: relative_cost(
                TransFGForImageClassification, TransFGConfig(**{**settings, "part_selection": selection})
            )
            for name, selection in by.items()
        }
    return counted


@torch.no_grad()
def latencies(plain: Path, ours: Path, transfg: Path | None, *, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time of a batch through each model on the device at hand, all in turn; medians, and ratios to the plain ViT."""
    attention = attention_of(ours)
    mevit = load(ours, attention)
    models = {"vit": load(plain, attention).to_vit()}
    models |= {f"mevit_{layer}": mevit.truncate(layer) for layer in mevit.config.exit_layers}
    if transfg is not None:
        for selection in ("row", "matrix_product"):
            model = load(transfg)
            model.config.part_selection = selection
            models[f"transfg_{model.config.num_hidden_layers} by {selection}"] = model
    side = mevit.config.image_size
    batch = torch.randn(batch_size, 3, side, side, device=DEVICE)
    runs = {name: lambda model=model: model(batch) for name, model in models.items()}
    seconds = times_in_turn(runs, rounds, description="latency")
    return {
        "device": torch.cuda.get_device_name() if DEVICE != "cpu" else f"CPU, {torch.get_num_threads()} threads",
        "attention": mevit.config._attn_implementation,
        "milliseconds": {name: 1000 * median(taken) for name, taken in seconds.items()},
        "relative_latency": {
            name: median_ratio(taken, seconds["vit"])["relative_latency"] for name, taken in seconds.items()
        },
    }


def early_exit_curve(directory: Path, data: DataArguments, test: DataSource, policy: str) -> list[dict[str, Any]]:
    """A run's early exit on test, with thresholds chosen on the images held out from its training.

    Args:
        directory: of the run.
        data: what it was trained on.
        test: the images to measure on.
        policy: exit policy.

    Returns:
        For each of `BUDGETS` that its earliest exit leaves room for: `budget`; `cost`, the mean on test; `taken`, a
        digit for each image: the place of the exit that it took. Of a model with one exit, nothing.
    """
    model = load(directory)
    if len(model.config.exit_layers) < 2:
        return []
    chosen_on = predict_exits(model, held_out_images(data, directory))
    measured_on = predict_exits(model, images_of(test, directory))
    tried = [chosen_on.simulate(policy, thresholds) for thresholds in shared_thresholds(chosen_on, policy)]
    points = []
    for budget in BUDGETS[chosen_on.costs[0] < BUDGETS]:
        taken = measured_on.exit_indices(policy, best_within_cost(tried, budget).thresholds)
        cost = float(measured_on.costs[taken].mean())
        points.append({"budget": float(budget), "cost": cost, "taken": "".join(map(_DIGITS.__getitem__, taken))})
    return points


def early_exit_rows(curves: list[list[dict[str, Any]]], ours: list[Path], plain: list[Path]) -> list[dict[str, Any]]:
    """Early exit against the plain ViT: the curves of all seeds of a model together.

    Args:
        curves: of [`early_exit_curve`], one for each run.
        ours: these runs.
        plain: runs of the plain ViT.

    Returns:
        For each budget: `budget`; `costs` and `seeds`, mean cost and accuracy of each run; `difference` to the plain
        ViT, and its 95 % paired bootstrap `interval`.
    """
    reference = correct_predictions(plain, "test")[1][:, :, -1].mean(0)  # (N,)
    _, correct, _ = correct_predictions(ours, "test")  # (seeds, N, E)
    rows = []
    for points in zip(*curves, strict=True):
        taken = np.array([[_DIGITS.index(digit) for digit in point["taken"]] for point in points])  # (seeds, N)
        right = np.take_along_axis(correct, taken[..., None], axis=2)[..., 0]
        difference = right.mean(0) - reference
        rows.append(
            {
                "budget": points[0]["budget"],
                "costs": [point["cost"] for point in points],
                "seeds": right.mean(1).tolist(),
                "difference": float(difference.mean()),
                "interval": paired_interval(difference, resamples=10_000),
            }
        )
    return rows


def attention_similarity(
    directory: Path, test: DataSource, num_images: int, num_shown: int
) -> tuple[list[float], Figure]:
    """Similarity of each layer's attention to the last layer's, (layers,), and a figure of some images' attention."""
    model = load(directory, "eager")
    dataset = images_of(test, directory)
    drawn = np.random.default_rng(0).permutation(len(dataset))[:num_images]
    batches = np.array_split(drawn, -(-len(drawn) // 32))
    maps = np.concatenate(
        [
            cls_attention(model, torch.stack([dataset[int(index)]["pixel_values"] for index in batch]))
            for batch in tqdm(batches, desc="attention", unit="batch")
        ]
    )
    pixel_values = torch.stack([dataset[int(index)]["pixel_values"] for index in drawn[:num_shown]])
    images = denormalize(pixel_values, load_image_processor(str(directory)))
    layers = list(range(1, model.config.num_hidden_layers + 1))
    return similarity_to_last(maps).tolist(), attention_maps(images, maps[:num_shown], layers)


def changes_by_class(directories: list[Path]) -> np.ndarray:
    """(L,): what each class gains or loses at the earliest exit against the last one, mean over seeds."""
    files = [
        json.loads((directory / "test_predictions.json").read_text(encoding="utf-8")) for directory in directories
    ]
    predictions = np.array([file["predictions"] for file in files])  # (seeds, N, E)
    num_labels = MEViTConfig.from_pretrained(directories[0]).num_labels
    return class_changes(np.array(files[0]["labels"]), predictions[..., 0], predictions[..., -1], num_labels)
