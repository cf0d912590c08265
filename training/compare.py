# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The paper's comparisons on one data set: trains or loads every model, and writes its tables 1 and 2, figures 2 to 4.

    accelerate launch training/compare.py training/configs/compare_grocery_store.yaml --dataset PATH --backbone PATH

One recipe for all models, several seeds. A run that is finished is not trained again, one that was interrupted goes
on, and what was measured is kept in `comparison/` until what it depends on changes: runs, settings or machine.

- `table.md`: accuracy (mean and standard deviation over seeds) with the paired bootstrap interval of its difference to
  the plain ViT, latency at batch 8, cost as the papers count it and as it is here;
- `exits.png`: accuracy of every exit by its cost, and of early exit with thresholds from validation (figure 2);
- `attention.png`: where [CLS] looks in each layer, and in the table how similar that is to the last layer (figure 3);
- `classes.png`: what each class gains or loses at the earliest exit (figure 4);
- `comparison.json`: all figures of these.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    ViTForImageClassification,
)

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.reports.attention import cls_attention, similarity_to_last
from modeling_mevit.early_exit.calibration import shared_thresholds, within_cost
from modeling_mevit.early_exit.cost import static_exit_costs, relative_cost
from modeling_mevit.data import ImageClassificationDataset, denormalize, evaluation_transform, load_split
from modeling_mevit.early_exit.evaluation import class_changes, plain_vit
from modeling_mevit.exit_policy_mevit import EXIT_POLICIES
from modeling_mevit.early_exit.predictions import predict_exits
from modeling_mevit.reports.figures import attention_maps, exit_accuracies
from modeling_mevit.reports.figures import class_changes as class_changes_figure
from modeling_mevit.reports.environment import environment_info
from training import train
from baselines import TransFGConfig, TransFGForImageClassification
from compare_runs import compare_exits, mean_and_std


logger = logging.getLogger(__name__)

PLAIN, OURS, TRANSFG = "vit", "mevit", "transfg"
BUDGETS = np.linspace(0.45, 0.9, 10)  # mean costs that thresholds are chosen for


@dataclass
class CompareArguments:
    """What is compared; further options are those of `train.py` and go to every run."""

    recipe: str = field(metadata={"help": "Config of train.py that all models share."})
    models: str = field(
        metadata={
            "help": "JSON (a mapping in the YAML file): 'vit', 'mevit' and perhaps 'transfg' → "
            "{'seeds': […], 'options': {options of train.py}}."
        }
    )
    output_dir: str = field(metadata={"help": "Where the runs are, MODEL-seedN, and the directory 'comparison'."})
    policy: str = field(default="confidence", metadata={"help": "Exit policy of the early-exit curve."})
    attention_images: int = field(default=256, metadata={"help": "Test photos whose attention is compared."})
    shown_images: int = field(default=4, metadata={"help": "Test photos whose attention is shown."})
    latency_batch_size: int = field(default=8, metadata={"help": "Images at a time when latency is measured."})
    latency_rounds: int = field(default=20, metadata={"help": "Times that each model runs, in turn."})


@dataclass(frozen=True)
class Comparison:
    """What is compared, read and checked.

    Args:
        arguments: of the command line.
        runs: model → one run for each seed: output directory → arguments of `train.main`.
    """

    arguments: CompareArguments
    runs: dict[str, dict[Path, list[str]]]

    def directories(self, model: str) -> list[Path]:
        return list(self.runs[model])


def read(argv: list[str]) -> Comparison:
    """`[CONFIG.yaml] [--option value …]`; options that are not ours are handed to every run of `train.py`."""
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*train.options_of(argv[0]), *argv[1:]]
    parser = HfArgumentParser(CompareArguments, allow_abbrev=False)
    arguments, common = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    models = json.loads(arguments.models)
    for name in (PLAIN, OURS):
        if name not in models:
            raise ValueError(f"models={sorted(models)} lack {name!r}, which the others are compared with.")
    if set(models) - {PLAIN, OURS, TRANSFG}:
        raise ValueError(f"models={sorted(models)} are not all known; allowed are {PLAIN}, {OURS} and {TRANSFG}.")
    if arguments.policy not in EXIT_POLICIES:
        raise ValueError(f"policy={arguments.policy!r} is unknown; allowed are {', '.join(EXIT_POLICIES)}.")
    runs: dict[str, dict[Path, list[str]]] = {}
    for name, settings in models.items():
        unknown = set(settings) - {"seeds", "options"}
        if unknown or not settings.get("seeds"):
            raise ValueError(f"models: {name!r} needs 'seeds' and may have 'options'; it has {sorted(settings)}.")
        own = train.options_from(settings.get("options", {}))
        runs[name] = {}
        for seed in settings["seeds"]:
            directory = Path(arguments.output_dir, f"{name}-seed{seed}")
            fixed = ["--seed", str(seed), "--output_dir", str(directory)]
            runs[name][directory] = [arguments.recipe, *common, *own, *fixed]
            _, data_arguments, _ = train.parse(runs[name][directory])
            if data_arguments.selection_fraction:
                raise ValueError("selection_fraction leaves the test photos alone; the comparison is made on them.")
    return Comparison(arguments, runs)


def ensure_trained(directory: Path, argv: list[str]) -> None:
    """Trains a run to its end, unless it is finished.

    Raises:
        ValueError: where the directory holds a run with another recipe.
    """
    arguments = train.parse(argv)
    metrics = directory / "metrics.json"
    if not (metrics.is_file() and (directory / "model.safetensors").is_file()):
        logger.info("training %s", directory)
        train.run(*train.prepare(*arguments), *arguments)
        return
    was = json.loads(metrics.read_text(encoding="utf-8"))["recipe"]
    wanted = train.settings_of(*arguments)
    default = train.settings_of(*train.parse(["--output_dir", str(directory)]))  # an option that came later had it
    for name in {*wanted, *(was.keys() & default.keys())}:
        if was.get(name, default.get(name)) != wanted.get(name):
            raise ValueError(
                f"{directory} was trained with {name}={was.get(name)}, and {wanted.get(name)} is asked for; "
                f"give another output_dir, or remove that run."
            )


def part(file: Path, depends_on: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute` gives, kept in a JSON file and computed anew only where what it depends on has changed."""
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["depends_on"] == json.loads(json.dumps(depends_on)):
            return kept["result"]
    partial = file.with_suffix(".partial")
    content = {"depends_on": depends_on, "result": compute()}
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))["result"]


def identity(directory: Path) -> str:
    """What tells a run from others: SHA-256 of what it predicts on test."""
    return hashlib.sha256((directory / "test_predictions.json").read_bytes()).hexdigest()


def accuracies(comparison: Comparison, model: str) -> list[dict[str, Any]]:
    """The rows of [`compare_exits`] of a model against the plain ViT, on test."""
    baseline, runs = (list(map(str, comparison.directories(name))) for name in (PLAIN, model))
    _, rows = compare_exits(baseline, runs, "test", resamples=10_000)
    return rows


def costs(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Cost of every model that is compared: [`costs_of`]."""
    config = MEViTConfig.from_pretrained(comparison.directories(OURS)[0])
    if TRANSFG not in comparison.runs:
        return costs_of(config)
    return costs_of(config, TransFGConfig.from_pretrained(comparison.directories(TRANSFG)[0]))


def costs_at_448() -> dict[str, dict[str, float]]:
    """Cost of the models of the paper: ViT-B/16 at 448 px with 200 classes, TransFG with stride 12."""
    settings = {"image_size": 448, "num_labels": 200}
    return costs_of(MEViTConfig(**settings), TransFGConfig(**settings))


def costs_of(config: MEViTConfig, transfg: TransFGConfig | None = None) -> dict[str, dict[str, float]]:
    """Cost of plain ViT, every exit and TransFG as the papers count it, and as it is here, on the modules that run.

    The papers count whole layers, and TransFG by the product of the attention matrices.
    """
    published, here = static_exit_costs(config, full_last_layer=True), static_exit_costs(config)
    counted = {PLAIN: {name: relative_cost(ViTForImageClassification, config) for name in ("published", "here")}}
    counted |= {f"{OURS}_{layer}": {"published": published[layer], "here": here[layer]} for layer in here}
    if transfg is not None:
        settings = transfg.to_dict()
        settings.pop("model_type")
        by = {"published": "matrix_product", "here": "row"}
        counted[f"{TRANSFG}_{transfg.num_hidden_layers}"] = {
            name: relative_cost(
                TransFGForImageClassification, TransFGConfig(**{**settings, "part_selection": selection})
            )
            for name, selection in by.items()
        }
    return counted


@torch.no_grad()
def latencies(comparison: Comparison) -> dict[str, Any]:
    """Time of a batch through each model on the device at hand, all in turn; medians, and ratios to the plain ViT."""
    device = _device()
    attention = _attention(comparison.directories(OURS)[0])
    ours = _load(comparison.directories(OURS)[0], attention)
    models = {PLAIN: plain_vit(_load(comparison.directories(PLAIN)[0], attention))}
    models |= {f"{OURS}_{layer}": ours.truncate(layer) for layer in ours.config.exit_layers}
    if TRANSFG in comparison.runs:
        for selection in ("row", "matrix_product"):
            transfg = _load(comparison.directories(TRANSFG)[0])
            transfg.config.part_selection = selection
            models[f"{TRANSFG}_{transfg.config.num_hidden_layers} by {selection}"] = transfg
    side = ours.config.image_size
    batch = torch.randn(comparison.arguments.latency_batch_size, 3, side, side, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(comparison.arguments.latency_rounds + 2), desc="latency", unit="round"):
        for name, model in models.items():
            start = time.perf_counter()
            model(batch)
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    counted = {name: taken[2:] for name, taken in seconds.items()}  # two rounds to warm up
    plain = counted[PLAIN]
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads",
        "attention": ours.config._attn_implementation,
        "milliseconds": {name: 1000 * median(taken) for name, taken in counted.items()},
        "ratio": {
            name: median(own / theirs for own, theirs in zip(taken, plain, strict=True))
            for name, taken in counted.items()
        },
    }


def early_exit_curve(comparison: Comparison, directory: Path, data: dict[str, Any]) -> list[dict[str, float]]:
    """Mean cost and accuracy on test of early exit, with thresholds chosen on validation for each budget."""
    policy = comparison.arguments.policy
    model = _load(directory)
    if len(model.config.exit_layers) < 2:
        return []
    records = {split: predict_exits(model, _images(directory, data, split)) for split in ("validation", "test")}
    path = shared_thresholds(records["validation"], policy)
    cheapest = records["validation"].costs[0]
    points = []
    for budget in BUDGETS[BUDGETS > cheapest]:
        setting = within_cost(records["validation"], policy, path, budget).setting
        outcome = records["test"].outcome(records["test"].places(policy, setting))
        points.append({"budget": float(budget), "cost": outcome.cost, "accuracy": outcome.accuracy})
    return points


def attention(comparison: Comparison, data: dict[str, Any]) -> list[float]:
    """Similarity of each layer's attention to the last layer's, (layers,); writes the figure too."""
    directory = comparison.directories(OURS)[0]
    model = _load(directory, "eager")
    dataset = _images(directory, data, "test")
    drawn = np.random.default_rng(0).permutation(len(dataset))[: comparison.arguments.attention_images]
    batches = np.array_split(drawn, -(-len(drawn) // 32))
    maps = np.concatenate(
        [
            cls_attention(model, torch.stack([dataset[int(index)]["pixel_values"] for index in batch]))
            for batch in tqdm(batches, desc="attention", unit="batch")
        ]
    )
    shown = comparison.arguments.shown_images
    processor = AutoImageProcessor.from_pretrained(directory)
    pixel_values = torch.stack([dataset[int(index)]["pixel_values"] for index in drawn[:shown]])
    layers = list(range(1, model.config.num_hidden_layers + 1))
    figure = attention_maps(denormalize(pixel_values, processor), maps[:shown], layers)
    figure.savefig(_report(comparison) / "attention.png", dpi=100)
    return similarity_to_last(maps).tolist()


def changes_by_class(comparison: Comparison) -> np.ndarray:
    """(L,): what each class gains or loses at the earliest exit against the last one, mean over seeds."""
    files = [
        json.loads((directory / "test_predictions.json").read_text(encoding="utf-8"))
        for directory in comparison.directories(OURS)
    ]
    predictions = np.array([file["predictions"] for file in files])  # (seeds, N, E)
    num_labels = MEViTConfig.from_pretrained(comparison.directories(OURS)[0]).num_labels
    return class_changes(np.array(files[0]["labels"]), predictions[..., 0], predictions[..., -1], num_labels)


def compare(comparison: Comparison) -> dict[str, Any]:
    """Measures what is not measured yet, and writes tables and figures. Returns what `comparison.json` holds."""
    report = _report(comparison)
    report.mkdir(parents=True, exist_ok=True)
    ours = comparison.directories(OURS)
    _, data_arguments, _ = train.parse(next(iter(comparison.runs[OURS].values())))
    names = ("dataset", "image_column", "label_column", "aircraft_level", "validation_fraction")
    data = {name: getattr(data_arguments, name) for name in names}
    runs = {
        model: {directory.name: identity(directory) for directory in runs} for model, runs in comparison.runs.items()
    }
    settings = vars(comparison.arguments)
    on = machine()

    def kept(name: str, compute: Callable[[], Any], *options: str, **depends_on: Any) -> Any:
        depends_on |= {option: settings[option] for option in options}
        return part(report / f"{name}.json", depends_on, compute)

    curves = [
        kept(
            f"early_exit-{directory.name}",
            lambda directory=directory: early_exit_curve(comparison, directory, data),
            "policy",
            run=identity(directory),
        )
        for directory in ours
    ]
    if not (report / "attention.png").is_file():
        (report / "attention.json").unlink(missing_ok=True)  # both are made at once
    similarity = kept(
        "attention",
        lambda: attention(comparison, data),
        "attention_images",
        "shown_images",
        run=identity(ours[0]),
    )
    changes = changes_by_class(comparison)
    results = {
        "dataset": json.loads((ours[0] / "metrics.json").read_text(encoding="utf-8"))["dataset"],
        "accuracy": {model: accuracies(comparison, model) for model in comparison.runs},
        "cost": kept("cost", lambda: costs(comparison), runs=runs),
        "cost_at_448": kept("cost_at_448", costs_at_448),
        "latency": kept(
            "latency", lambda: latencies(comparison), "latency_batch_size", "latency_rounds", runs=runs, machine=on
        ),
        "early_exit": curves,
        "attention_similarity": similarity,
        "class_changes": [None if np.isnan(change) else change for change in changes.tolist()],
        "machine": on,
    }
    rows = results["accuracy"][OURS]
    layers = [row["exit"] for row in rows]
    exit_accuracies(
        layers,
        np.array([row["seeds"] for row in rows]).T,
        [results["cost"][f"{OURS}_{layer}"]["here"] for layer in layers],
        np.array(results["accuracy"][PLAIN][-1]["seeds"]),
        np.mean([[[point["cost"], point["accuracy"]] for point in curve] for curve in curves], axis=0)
        if all(curves)
        else None,
    ).savefig(report / "exits.png", dpi=120)
    title = f"exit {layers[0]} against exit {layers[-1]}"
    class_changes_figure(changes, title).savefig(report / "classes.png", dpi=120)
    (report / "comparison.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (report / "table.md").write_text(tables(results) + "\n", encoding="utf-8")
    return results


def tables(results: dict[str, Any]) -> str:
    """Markdown: the models; what they cost at 448 px; how similar attention is to the last layer's."""
    latency = results["latency"]
    lines = [
        "| model | test accuracy (%) | difference (points) | 95 % interval | latency (ms) | relative | "
        "cost as published | cost here |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, rows in results["accuracy"].items():
        for row in rows:
            name = PLAIN if model == PLAIN else f"{model}_{row['exit']}"
            timed = f"{name} by row" if model == TRANSFG else name
            low, high = (f"{100 * end:+.1f}" for end in row["interval"])
            cost = results["cost"][name]
            lines.append(
                f"| {shown(name)} | {mean_and_std(row['seeds'])} | {100 * row['difference']:+.1f} | {low} … {high} | "
                f"{latency['milliseconds'][timed]:.1f} | {latency['ratio'][timed]:.2f} | {cost['published']:.2f} | "
                f"{cost['here']:.2f} |"
            )
    if any(name.endswith("by matrix_product") for name in latency["ratio"]):
        (published,) = (ratio for name, ratio in latency["ratio"].items() if name.endswith("by matrix_product"))
        lines += [
            "",
            f"With the selection of parts as published, TransFG takes {published:.2f} of the plain ViT's time.",
        ]
    lines += [
        f"Latency: a batch on {latency['device']}, {latency['attention']} attention (TransFG: eager), medians of runs "
        f"in turn.",
        "",
    ]
    lines += ["| ViT-B/16 at 448 px | cost as published | cost here |", "| --- | --- | --- |"]
    lines += [
        f"| {shown(name)} | {cost['published']:.2f} | {cost['here']:.2f} |"
        for name, cost in results["cost_at_448"].items()
    ]
    similarity = results["attention_similarity"]
    lines += ["", f"| layer | {' | '.join(map(str, range(1, len(similarity) + 1)))} |"]
    lines += ["| --- |" + " --- |" * len(similarity)]
    lines += [f"| similarity to the last layer | {' | '.join(f'{value:.2f}' for value in similarity)} |"]
    changes = [change for change in results["class_changes"] if change is not None]
    lose_nothing = sum(change >= 0 for change in changes)
    lines += ["", f"At the earliest exit, {lose_nothing} of {len(changes)} classes lose nothing."]
    return "\n".join(lines)


def shown(name: str) -> str:
    """The name of a model, `mevit_6` say, as tables write it."""
    model, _, layer = name.partition("_")
    return {PLAIN: "plain ViT", OURS: f"MEViT_{layer}", TRANSFG: "TransFG"}[model]


def _report(comparison: Comparison) -> Path:
    return Path(comparison.arguments.output_dir, "comparison")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(
    directory: Path, attention: str | None = None
) -> MEViTForImageClassification | TransFGForImageClassification:
    options = {"attn_implementation": attention} if attention else {}
    return AutoModelForImageClassification.from_pretrained(directory, **options).to(_device()).eval()


def _attention(directory: Path) -> str | None:
    """The implementation of attention that a run was trained with; None for the library's choice."""
    settings = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["recipe"]
    return json.loads(settings.get("model_config", "{}")).get("attn_implementation")


def _images(directory: Path, data: dict[str, Any], split: str) -> ImageClassificationDataset:
    config = MEViTConfig.from_pretrained(directory)
    options = {name: value for name, value in data.items() if name != "dataset"}
    rows = load_split(config.label2id, data["dataset"], split, **options)
    return ImageClassificationDataset(rows, evaluation_transform(AutoImageProcessor.from_pretrained(directory)))


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Trains what is not trained, measures what is not measured, prints the tables.

    Returns:
        What `comparison.json` holds; None in processes beside the main one.
    """
    comparison = read(sys.argv[1:] if argv is None else argv)
    for runs in comparison.runs.values():
        for directory, options in runs.items():
            ensure_trained(directory, options)
    if not PartialState().is_main_process:
        return None
    results = compare(comparison)
    print(f"\n{tables(results)}\n\nEverything is in {_report(comparison)}.")
    return results


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: error: {error}")
