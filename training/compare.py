# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The paper's comparisons on one data set: trains or loads every model, and writes its tables 1 and 2, figures 2 to 4.

    accelerate launch training/compare.py compare_grocery_store.yaml --dataset PATH --backbone PATH

One recipe for all models, several seeds. A run that is finished is not trained again, one that was interrupted goes
on, and what was measured is kept in `comparison/` until what it depends on changes: runs, settings or machine. With
`--selection_fraction`, thresholds are chosen on the images held out from train too, and test is not looked at before
every run is trained.

- `table.md`: accuracy (mean and standard deviation over seeds) with the paired bootstrap interval of its difference to
  the plain ViT, latency at batch 8, cost as the papers count it and as it is here; early exit at several mean costs;
- `exits.png`: accuracy of every exit by its cost, and of early exit with thresholds from validation (figure 2);
- `attention.png`: where [CLS] looks in each layer, and in the table how similar that is to the last layer (figure 3);
- `classes.png`: what each class gains or loses at the earliest exit (figure 4);
- `comparison.json`: all numbers of these.
"""

import check_installed  # noqa: F401 (before what it looks for)


# isort: split

import json
import logging
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

import measurements
import train
from baselines import TransFGConfig
from compare_runs import compare_exits, mean_and_std
from measurements import cached, run_digest
from modeling_mevit import DataSource, MEViTConfig
from modeling_mevit.exit_policy_mevit import EXIT_POLICIES
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.figures import class_changes_figure, exit_accuracies
from modeling_mevit.reports.tables import markdown_table
from run_results import settings_of
from settings import SettingsParser, as_mapping, read_config, split_config


logger = logging.getLogger(__name__)

PLAIN, OURS, TRANSFG = "vit", "mevit", "transfg"


@dataclass
class CompareArguments:
    """What is compared; further options are those of `train.py` and go to every run."""

    recipe: str = field(metadata={"help": "Config of train.py that all models share."})
    models: dict[str, Any] | str | None = field(
        metadata={
            "help": "'vit', 'mevit' and perhaps 'transfg' → {'seeds': […], 'options': {options of train.py}}: a "
            "mapping, as JSON in an option."
        }
    )
    output_dir: str = field(metadata={"help": "Where the runs are, MODEL-seedN, and the directory 'comparison'."})
    policy: str = field(default="confidence", metadata={"help": "Exit policy of the early-exit curve."})
    attention_images: int = field(default=256, metadata={"help": "Test images whose attention is compared."})
    shown_images: int = field(default=4, metadata={"help": "Test images whose attention is shown."})
    latency_batch_size: int = field(default=8, metadata={"help": "Images at a time when latency is measured."})
    latency_rounds: int = field(default=20, metadata={"help": "Times that each model runs, in turn."})

    def __post_init__(self) -> None:
        self.models = as_mapping("models", self.models)
        for name in (PLAIN, OURS):
            if name not in self.models:
                raise ValueError(f"models must have {PLAIN!r} and {OURS!r}, got {sorted(self.models)}")
        if set(self.models) - {PLAIN, OURS, TRANSFG}:
            raise ValueError(f"models must be {PLAIN}, {OURS} and {TRANSFG}, got {sorted(self.models)}")
        for name, settings in self.models.items():
            if set(settings) - {"seeds", "options"} or not settings.get("seeds"):
                raise ValueError(f"models: {name!r} must have 'seeds' and may have 'options', got {sorted(settings)}")
        if self.policy not in EXIT_POLICIES:
            raise ValueError(f"policy must be one of {', '.join(EXIT_POLICIES)}, got {self.policy!r}")


@dataclass(frozen=True)
class Comparison:
    """What is compared, read and checked.

    Args:
        arguments: of the command line.
        runs: model → one run for each seed: output directory → its settings.
    """

    arguments: CompareArguments
    runs: dict[str, dict[Path, train.RunArguments]]

    @property
    def report(self) -> Path:
        """Directory of what is measured."""
        return Path(self.arguments.output_dir, "comparison")

    def directories(self, model: str) -> list[Path]:
        """Output directories of a model's runs."""
        return list(self.runs[model])


def read(argv: list[str]) -> Comparison:
    """`[CONFIG.yaml] [--option value …]`; options that are not ours are handed to every run of `train.py`."""
    settings, options = split_config(argv)
    given, options = SettingsParser(CompareArguments, "compare.py").given(options)
    names = {own.name for own in fields(CompareArguments)}
    ours = {name: value for name, value in settings.items() if name in names}
    (arguments,) = SettingsParser(CompareArguments, "compare.py").parse([], {**ours, **given})

    common = {name: value for name, value in settings.items() if name not in names}
    given, unknown = train.settings_parser().given(options)
    train.settings_parser().refuse(unknown)
    common = {**read_config(arguments.recipe), **common, **given}
    runs: dict[str, dict[Path, train.RunArguments]] = {name: {} for name in arguments.models}
    for name, model in arguments.models.items():
        for seed in model["seeds"]:
            directory = Path(arguments.output_dir, f"{name}-seed{seed}")
            own = {**common, **model.get("options", {}), "seed": seed, "output_dir": str(directory)}
            runs[name][directory] = train.RunArguments(*train.settings_parser().parse([], own))
    return Comparison(arguments, runs)


def ensure_trained(directory: Path, arguments: train.RunArguments) -> None:
    """Trains a run to its end, unless it is finished. Of one that is measured, the weights may be gone.

    Raises:
        ValueError: if the directory holds a run with another recipe.
    """
    metrics = directory / "metrics.json"
    kept = any((directory / name).is_file() for name in ("model.safetensors", "test_predictions.json"))
    if not (metrics.is_file() and kept):
        logger.info("training %s", directory)
        train.run(train.prepare(arguments))
        return
    was = json.loads(metrics.read_text(encoding="utf-8"))["recipe"]
    wanted = settings_of(arguments)
    default = settings_of(train.parse(["--output_dir", str(directory)]))  # an option that came later had it
    for name in {*wanted, *(was.keys() & default.keys())}:
        if was.get(name, default.get(name)) != wanted.get(name):
            raise ValueError(
                f"{directory} was trained with {name}={was.get(name)}, and {wanted.get(name)} is asked for; "
                f"give another output_dir, or remove that run"
            )


def compare(comparison: Comparison) -> dict[str, Any]:
    """Measures what is not measured yet, and writes tables and figures. Returns what `comparison.json` holds."""
    arguments, report = comparison.arguments, comparison.report
    report.mkdir(parents=True, exist_ok=True)
    plain, ours = comparison.directories(PLAIN), comparison.directories(OURS)
    transfg = comparison.directories(TRANSFG)[0] if TRANSFG in comparison.runs else None
    data = comparison.runs[OURS][ours[0]].data
    test = DataSource(data.dataset, "test", image_column=data.image_column, label_column=data.label_column)
    for model in comparison.runs:
        for directory in comparison.directories(model):
            measurements.ensure_tested(directory, test)
    runs = {
        model: {directory.name: run_digest(directory) for directory in comparison.directories(model)}
        for model in comparison.runs
    }
    environment = environment_info()

    curves = [
        cached(
            report / f"early_exit-{directory.name}.json",
            {
                "policy": arguments.policy,
                "selection_fraction": data.selection_fraction,
                "run": run_digest(directory),
            },
            partial(measurements.early_exit_curve, directory, data, test, arguments.policy),
        )
        for directory in ours
    ]
    similarity = attention(comparison, ours[0], test)
    config = MEViTConfig.from_pretrained(ours[0])
    changes = measurements.changes_by_class(ours)
    results = {
        "dataset": json.loads((ours[0] / "metrics.json").read_text(encoding="utf-8"))["dataset"],
        "accuracy": {
            model: compare_exits(plain, comparison.directories(model), "test", resamples=10_000)[1]
            for model in comparison.runs
        },
        "cost": cached(
            report / "cost.json",
            {"runs": runs},
            lambda: measurements.model_costs(config, TransFGConfig.from_pretrained(transfg) if transfg else None),
        ),
        # the models of the paper: ViT-B/16 with 200 classes, TransFG with stride 12
        "cost_at_448": cached(
            report / "cost_at_448.json",
            {},
            lambda: measurements.model_costs(
                *(config_class(image_size=448, num_labels=200) for config_class in (MEViTConfig, TransFGConfig))
            ),
        ),
        "latency": cached(
            report / "latency.json",
            {
                "latency_batch_size": arguments.latency_batch_size,
                "latency_rounds": arguments.latency_rounds,
                "runs": runs,
                "environment": environment,
            },
            partial(
                measurements.latencies,
                plain[0],
                ours[0],
                transfg,
                batch_size=arguments.latency_batch_size,
                rounds=arguments.latency_rounds,
            ),
        ),
        "early_exit": measurements.early_exit_rows(curves, ours, plain),
        "attention_similarity": similarity,
        "class_changes": [None if np.isnan(change) else change for change in changes.tolist()],
        "environment": environment,
    }
    write_figures(report, results, changes)
    (report / "comparison.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (report / "table.md").write_text(tables(results) + "\n", encoding="utf-8")
    return results


def attention(comparison: Comparison, directory: Path, test: DataSource) -> list[float]:
    """Similarity of each layer's attention to the last layer's, (layers,); writes the figure too."""
    arguments, report = comparison.arguments, comparison.report
    if not (report / "attention.png").is_file():
        (report / "attention.json").unlink(missing_ok=True)  # both are made at once

    def measure() -> list[float]:
        similarity, figure = measurements.attention_similarity(
            directory, test, arguments.attention_images, arguments.shown_images
        )
        figure.savefig(report / "attention.png", dpi=100)
        return similarity

    depends_on = {
        "attention_images": arguments.attention_images,
        "shown_images": arguments.shown_images,
        "run": run_digest(directory),
    }
    return cached(report / "attention.json", depends_on, measure)


def write_figures(report: Path, results: dict[str, Any], changes: np.ndarray) -> None:
    """`exits.png` and `classes.png`."""
    rows = results["accuracy"][OURS]
    layers = [row["exit"] for row in rows]
    curve = [(np.mean(row["costs"]), np.mean(row["seeds"])) for row in results["early_exit"]]
    exit_accuracies(
        layers,
        np.array([row["seeds"] for row in rows]).T,
        [results["cost"][f"{OURS}_{layer}"]["here"] for layer in layers],
        np.array(results["accuracy"][PLAIN][-1]["seeds"]),
        np.array(curve) if curve else None,
    ).savefig(report / "exits.png", dpi=120)
    title = f"exit {layers[0]} against exit {layers[-1]}"
    class_changes_figure(changes, title).savefig(report / "classes.png", dpi=120)


def tables(results: dict[str, Any]) -> str:
    """Markdown: the models; what they cost at 448 px; how similar attention is to the last layer's."""
    latency = results["latency"]
    rows = []
    for model, accuracies in results["accuracy"].items():
        for row in accuracies:
            name = PLAIN if model == PLAIN else f"{model}_{row['exit']}"
            timed = f"{name} by row" if model == TRANSFG else name
            low, high = (f"{100 * end:+.1f}" for end in row["interval"])
            cost = results["cost"][name]
            rows.append(
                (
                    display_name(name),
                    mean_and_std(row["seeds"]),
                    f"{100 * row['difference']:+.1f}",
                    f"{low} … {high}",
                    f"{latency['milliseconds'][timed]:.1f}",
                    f"{latency['relative_latency'][timed]:.2f}",
                    f"{cost['published']:.2f}",
                    f"{cost['here']:.2f}",
                )
            )
    header = ("model", "test accuracy (%)", "difference (points)", "95 % interval", "latency (ms)", "relative")
    parts = [markdown_table((*header, "cost as published", "cost here"), rows)]
    early_exit = [
        (
            f"{row['budget']:.2f}",
            f"{np.mean(row['costs']):.3f}",
            mean_and_std(row["seeds"]),
            f"{100 * row['difference']:+.1f}",
            " … ".join(f"{100 * end:+.1f}" for end in row["interval"]),
        )
        for row in results["early_exit"]
    ]
    if early_exit:
        parts.append(
            markdown_table(
                ("early exit at a mean cost of at most", "cost on test", *header[1:4]),
                early_exit,
            )
        )
    published = [ratio for name, ratio in latency["relative_latency"].items() if name.endswith("by matrix_product")]
    if published:
        parts.append(
            f"With the selection of parts as published, TransFG takes {published[0]:.2f} of the plain ViT's time."
        )
    parts.append(
        f"Latency: a batch on {latency['device']}, {latency['attention']} attention (TransFG: eager), medians of runs "
        f"in turn."
    )
    parts.append(
        markdown_table(
            ("ViT-B/16 at 448 px", "cost as published", "cost here"),
            (
                (display_name(name), f"{cost['published']:.2f}", f"{cost['here']:.2f}")
                for name, cost in results["cost_at_448"].items()
            ),
        )
    )
    similarity = results["attention_similarity"]
    cells = [f"{value:.2f}" for value in similarity]
    parts.append(markdown_table(("layer", *range(1, len(similarity) + 1)), [("similarity to the last layer", *cells)]))
    changes = [change for change in results["class_changes"] if change is not None]
    lose_nothing = sum(change >= 0 for change in changes)
    parts.append(f"At the earliest exit, {lose_nothing} of {len(changes)} classes lose nothing.")
    return "\n\n".join(parts)


def display_name(name: str) -> str:
    """The name of a model, `mevit_6` say, as tables write it."""
    model, _, layer = name.partition("_")
    return {PLAIN: "plain ViT", OURS: f"MEViT_{layer}", TRANSFG: "TransFG"}[model]


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Trains what is not trained, measures what is not measured, prints the tables.

    Returns:
        What `comparison.json` holds; None in processes beside the main one.
    """
    comparison = read(sys.argv[1:] if argv is None else argv)
    for runs in comparison.runs.values():
        for directory, arguments in runs.items():
            ensure_trained(directory, arguments)
    if not PartialState().is_main_process:
        return None
    results = compare(comparison)
    print(f"\n{tables(results)}\n\nEverything is in {comparison.report}.")
    return results


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: error: {error}")
