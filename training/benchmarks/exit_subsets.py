# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What it would save to leave exits out: every subset of a trained model's exits, at the same target.

    python training/benchmarks/exit_subsets.py runs/mevit-seed0 --data PATH [--output exit_subsets.json]

An image that goes on pays for the exits that it was asked at. What that takes is measured on the machine at hand, as a
share of the plain ViT's time: `base[k]`, a run in which every image leaves at exit k and no other exit is asked, and
`asked[k]`, what exit k adds to a run that it stops for no image. An image that leaves at exit k of a subset S takes
`base[k]` and `asked[j]` for each j before k in S.

The first half of the split calibrates each subset and chooses the fastest; the second half tells what that is worth.
The times of the chosen subset and of all exits are measured there too, on real runs in turn.
"""

import json
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from modeling_mevit import CalibrationTarget, DataSource, MEViTForImageClassification
from modeling_mevit.checkpoint import load_image_processor
from modeling_mevit.early_exit.calibration import calibrate_predictions
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.tables import markdown_table
from timing import median_ratio, times_in_turn


ASKED = 1e-30  # a threshold that no score is below and that asks the exit all the same
TAKEN = 1e30


@dataclass
class ExitSubsetsArguments:
    """What is measured."""

    data: str = field(metadata={"help": "The data set, as train.py reads it."})
    split: str = field(default="validation", metadata={"help": "Split whose halves choose and measure."})
    policy: str = field(default="confidence", metadata={"help": "Exit policy; not patience, which asks every exit."})
    max_accuracy_drop: float = field(default=0.01, metadata={"help": "What the thresholds may lose."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Images at a time."})
    rounds: int = field(default=20, metadata={"help": "Times that each run is timed, in turn."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


@dataclass(frozen=True)
class Costs:
    """Times relative to the plain ViT's.

    Args:
        base: (E,), of a run in which every image leaves at this exit, the only one asked.
        asked: (E − 1,), what an early exit adds that is asked and stops no image.
    """

    base: np.ndarray
    asked: np.ndarray

    def mean(self, indices: np.ndarray, subset: tuple[int, ...], exit_layers: list[int]) -> float:
        """Mean time of images that leave at the exits of `indices`, (N,), where those of `subset` are asked."""
        asks = np.array([layer in subset for layer in exit_layers[:-1]])
        before = np.concatenate([[0.0], np.cumsum(self.asked * asks)])  # asked before each exit
        return float((self.base + before)[indices].mean())


@torch.no_grad()
def measure_costs(model: MEViTForImageClassification, batch: torch.Tensor, rounds: int) -> Costs:
    """Times each exit, all in turn."""
    layers, plain = model.config.exit_layers, model.to_vit()
    early = len(layers) - 1

    def run(asked: dict[int, float]) -> Any:
        thresholds = [asked.get(place, 0.0) for place in range(early)]
        return lambda: model(batch, early_exit=True, exit_thresholds=thresholds)

    runs = {"plain": lambda: plain(batch), "none": run({})}
    runs |= {f"base {place}": run({place: TAKEN}) for place in range(early)}
    runs |= {f"asked {place}": run({place: ASKED}) for place in range(early)}
    seconds = times_in_turn(runs, rounds)
    ratio = {name: median_ratio(taken, seconds["plain"])["relative_latency"] for name, taken in seconds.items()}
    return Costs(
        np.array([*(ratio[f"base {place}"] for place in range(early)), ratio["none"]]),
        np.array([ratio[f"asked {place}"] - ratio["none"] for place in range(early)]),
    )


def subsets_of(exit_layers: list[int]) -> list[tuple[int, ...]]:
    """Every subset of the early exits but the empty one, each with the last exit."""
    early = exit_layers[:-1]
    chosen = chain.from_iterable(combinations(early, size) for size in range(1, len(early) + 1))
    return [(*subset, exit_layers[-1]) for subset in chosen]


def calibrated(
    halves: tuple[ExitPredictions, ExitPredictions], subset: tuple[int, ...], target: CalibrationTarget, policy: str
) -> tuple[list[float], list[np.ndarray]] | None:
    """Thresholds for a subset by the first half, and the exits taken on both; None where early exit stays off."""
    asked = CalibrationTarget(**{**asdict(target), "exits": subset})
    point = calibrate_predictions(halves[0], asked, policy=policy, num_labels=2).operating_point
    if point is None:
        return None
    return point.thresholds, [half.exit_indices(policy, point.thresholds) for half in halves]


@torch.no_grad()
def time_of(
    model: MEViTForImageClassification, images: torch.Tensor, batch_size: int, thresholds: list[list[float]]
) -> list[float]:
    """Times of real early-exit runs over the images, under several thresholds, relative to the plain ViT's."""
    plain, batches = model.to_vit(), images.split(batch_size)
    runs: dict[str, Any] = {"plain": lambda: [plain(batch) for batch in batches]}
    for number, values in enumerate(thresholds):
        runs[str(number)] = lambda values=values: [
            model(batch, early_exit=True, exit_thresholds=values) for batch in batches
        ]
    seconds = times_in_turn(runs, 5)
    return [median_ratio(seconds[str(n)], seconds["plain"])["relative_latency"] for n in range(len(thresholds))]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints the table. Returns a row for each batch size."""
    parser = HfArgumentParser(ExitSubsetsArguments)
    parser.add_argument("run", help="Output directory of train.py, of a MEViT.")
    arguments, known = parser.parse_args_into_dataclasses(argv)
    model = MEViTForImageClassification.from_pretrained(
        known.run, exit_combination="none", exit_policy=arguments.policy
    ).eval()
    layers = model.config.exit_layers
    processor = load_image_processor(known.run)
    datasets = [
        DataSource(arguments.data, arguments.split, half).load(model.config.label2id, processor)
        for half in ("first", "second")
    ]
    halves = tuple(predict_exits(model, dataset) for dataset in datasets)
    target = CalibrationTarget(max_accuracy_drop=arguments.max_accuracy_drop)
    found = {
        subset: result
        for subset in subsets_of(layers)
        if (result := calibrated(halves, subset, target, arguments.policy)) is not None
    }
    images = torch.stack([datasets[1][index]["pixel_values"] for index in range(min(len(datasets[1]), 128))])
    rows = []
    for batch_size in tqdm(arguments.batch_sizes, desc="batch sizes"):
        costs = measure_costs(model, images[:batch_size], arguments.rounds)
        times = {
            subset: [costs.mean(taken, subset, layers) for taken in by_half] for subset, (_, by_half) in found.items()
        }
        best, every = min(times, key=lambda subset: times[subset][0]), tuple(layers)
        measured = time_of(model, images, batch_size, [found[every][0], found[best][0]])
        drops = [
            halves[1].operating_point(arguments.policy, found[subset][0], found[subset][1][1]).drop
            for subset in (every, best)
        ]
        rows.append(
            {
                "batch_size": batch_size,
                "exits": list(best),
                "base": costs.base.tolist(),
                "asked": costs.asked.tolist(),
                "all_exits": {"estimated": times[every][1], "measured": measured[0], "drop": drops[0]},
                "chosen": {"estimated": times[best][1], "measured": measured[1], "drop": drops[1]},
            }
        )
    print(f"\n{table_of(rows)}")
    if arguments.output:
        content = {**asdict(arguments), "output": None, "rows": rows, "environment": environment_info()}
        Path(arguments.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each batch size."""
    cells = [
        (
            row["batch_size"],
            ", ".join(map(str, row["exits"])),
            *(f"{row[kind][how]:.3f}" for kind in ("all_exits", "chosen") for how in ("estimated", "measured")),
            f"{1 - row['chosen']['measured'] / row['all_exits']['measured']:+.1%}",
            *(f"{100 * row[kind]['drop']:+.1f}" for kind in ("all_exits", "chosen")),
        )
        for row in rows
    ]
    names = ("all exits, estimated", "measured", "chosen, estimated", "measured")
    return markdown_table(("batch", "chosen exits", *names, "saved", "drop of all", "drop of chosen"), cells)


if __name__ == "__main__":
    main()
