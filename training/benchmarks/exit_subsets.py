# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What it would save to leave exits out: the fastest subset of a trained model's exits, under the same promise.

    python training/benchmarks/exit_subsets.py --runs runs/mevit-seed0 … --data PATH [--output exit_subsets.json]

An image that goes on pays for the exits that it was asked at. What that takes is measured on the machine at hand with
the last run's model, as a share of the plain ViT's time: `base[k]`, a run in which every image leaves at exit k and no
other exit is asked, and `asked[k]`, what exit k adds to a run that it stops for no image. An image that leaves at exit
k of a subset S takes `base[k]` and `asked[j]` for each j before k in S. These times are estimates: a batch that
shrinks may take longer an image.

The validation images choose the subset: the fastest one that loses at most the promised drop there. One half of the
test images then certifies the thresholds of the subset and those of all exits, for the same promise, and the other
half tells what both take and lose; then the other way round, for each run.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from modeling_mevit import CalibrationTarget, DataSource, MEViTForImageClassification
from modeling_mevit.checkpoint import load_image_processor
from modeling_mevit.data.datasets import HALVES
from modeling_mevit.early_exit.calibration import calibrate_predictions
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from modeling_mevit.exit_policy_mevit import EXIT_POLICIES
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.tables import markdown_table
from timing import median_ratio, times_in_turn


ASKED = 1e-30  # a threshold that no score is below and that asks the exit all the same
TAKEN = 1e30


@dataclass
class ExitSubsetsArguments:
    """What is measured."""

    runs: list[str] = field(metadata={"help": "Output directories of train.py, of a MEViT; one for each seed."})
    data: str = field(metadata={"help": "The data set, as train.py reads it."})
    policy: str = field(default="confidence", metadata={"help": "Exit policy; not patience, which asks every exit."})
    drops: list[float] = field(default_factory=lambda: [0.01, 0.02], metadata={"help": "Accuracy drops promised."})
    confidence: float = field(default=0.95, metadata={"help": "Of the promise."})
    bound: str = field(default="difference", metadata={"help": "Of the promise."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Images at a time."})
    rounds: int = field(default=20, metadata={"help": "Times that each run is timed, in turn."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        policies = [policy for policy in EXIT_POLICIES if policy != "patience"]
        if self.policy not in policies:
            raise ValueError(f"policy must be one of {', '.join(policies)}, got {self.policy!r}")


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


@dataclass(frozen=True)
class Predictions:
    """Of every exit of a run that knows so many labels, on the validation images and on both halves of test."""

    validation: ExitPredictions
    halves: dict[str, ExitPredictions]
    num_labels: int


@dataclass(frozen=True)
class Outcome:
    """What some exits give on images that neither chose nor certified them.

    Args:
        time: relative to the plain ViT's.
        cost: mean cost, by counted operations.
        drop: of accuracy against the last exit; 0 where nothing was certified, so that early exit stays off.
    """

    time: float
    cost: float
    drop: float


@torch.no_grad()
def measure_costs(model: MEViTForImageClassification, batch: torch.Tensor, rounds: int) -> Costs:
    """Times each exit, all in turn."""
    layers, plain = model.config.exit_layers, model.to_vit()
    early = len(layers) - 1

    def run(asked: dict[int, float]) -> Callable[[], Any]:
        thresholds = [asked.get(place, 0.0) for place in range(early)]
        return lambda: model(batch, early_exit=True, exit_thresholds=thresholds)

    runs = {"plain": lambda: plain(batch), "none": run({})}
    runs |= {f"base {place}": run({place: TAKEN}) for place in range(early)}
    runs |= {f"asked {place}": run({place: ASKED}) for place in range(early)}
    seconds = times_in_turn(runs, rounds, f"batches of {len(batch)}")
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


def fastest(predictions: ExitPredictions, drop: float, costs: Costs, policy: str) -> tuple[int, ...]:
    """The subset of the exits that takes least time, of those that lose at most this drop on these images, which
    guarantees nothing; all exits where no subset saves anything."""
    layers, times = predictions.exit_layers, {}
    for subset in subsets_of(layers):
        target = CalibrationTarget(max_accuracy_drop=drop, exits=subset)
        # without a guarantee the thresholds to try do not depend on the number of labels
        point = calibrate_predictions(predictions, target, policy=policy, num_labels=2).operating_point
        if point is not None:
            times[subset] = costs.mean(predictions.exit_indices(policy, point.thresholds), subset, layers)
    return min(times, key=lambda subset: times[subset], default=tuple(layers))


def outcome(
    certifying: ExitPredictions,
    measured: ExitPredictions,
    promise: CalibrationTarget,
    exits: tuple[int, ...],
    costs: Costs,
    policy: str,
    num_labels: int,
) -> Outcome:
    """What these exits take and lose on some images, with thresholds that others certify."""
    layers = measured.exit_layers
    target = replace(promise, exits=exits)
    point = calibrate_predictions(certifying, target, policy=policy, num_labels=num_labels).operating_point
    if point is None:
        last = np.full(len(measured), len(layers) - 1)
        return Outcome(costs.mean(last, (), layers), float(measured.costs[-1]), 0.0)
    indices = measured.exit_indices(policy, point.thresholds)
    found = measured.operating_point(policy, point.thresholds, indices)
    assert found.drop is not None  # the images have labels
    return Outcome(costs.mean(indices, exits, layers), found.cost, found.drop)


def compare(runs: list[Predictions], promise: CalibrationTarget, costs: Costs, policy: str) -> dict[str, Any]:
    """All exits and the subset that each run's validation images choose, over all runs and both ways round."""
    subsets, outcomes = [], []
    for run in runs:
        assert promise.max_accuracy_drop is not None
        subset = fastest(run.validation, promise.max_accuracy_drop, costs, policy)
        subsets.append(list(subset))
        every = tuple(run.validation.exit_layers)
        for certifying, measured in (HALVES, HALVES[::-1]):
            halves = run.halves[certifying], run.halves[measured]
            outcomes.append(
                [asdict(outcome(*halves, promise, exits, costs, policy, run.num_labels)) for exits in (every, subset)]
            )
    return {
        "promise": promise.to_dict(),
        "chosen": subsets,
        "outcomes": outcomes,
        "saved": [1 - subset["time"] / every["time"] for every, subset in outcomes],
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each promise and batch size, means over the runs and both ways round."""

    def mean(row: dict[str, Any], which: int, what: str) -> float:
        return float(np.mean([pair[which][what] for pair in row["outcomes"]]))

    cells = [
        (
            f"{row['promise']['max_accuracy_drop']:.1%}",
            row["batch_size"],
            "; ".join(", ".join(map(str, subset)) for subset in row["chosen"]),
            *(f"{mean(row, which, 'time'):.3f}" for which in (0, 1)),
            f"{np.mean(row['saved']):+.1%}",
            f"{min(row['saved']):+.1%} … {max(row['saved']):+.1%}",
            *(f"{100 * mean(row, which, 'drop'):+.1f}" for which in (0, 1)),
        )
        for row in rows
    ]
    header = ("promised drop", "batch", "exits chosen by each run", "estimated time, all exits", "chosen")
    return markdown_table((*header, "saved", "least … most", "drop of all", "drop of chosen"), cells)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints the table. Returns a row for each promise and batch size."""
    (arguments,) = HfArgumentParser(ExitSubsetsArguments).parse_args_into_dataclasses(argv)
    runs, policy = [], arguments.policy
    for directory in arguments.runs:
        model = MEViTForImageClassification.from_pretrained(directory, exit_combination="none", exit_policy=policy)
        model.eval()
        processor = load_image_processor(directory)
        validation, *halves = (
            DataSource(arguments.data, split, half).load(model.config.label2id, processor)
            for split, half in [("validation", None), *(("test", half) for half in HALVES)]
        )
        by_half = {half: predict_exits(model, images) for half, images in zip(HALVES, halves, strict=True)}
        runs.append(Predictions(predict_exits(model, validation), by_half, model.config.num_labels))
    if len(validation) < max(arguments.batch_sizes):
        raise ValueError(
            f"batch_sizes must be at most {len(validation)}, the validation images, got {arguments.batch_sizes}"
        )
    images = torch.stack([validation[index]["pixel_values"] for index in range(max(arguments.batch_sizes))])
    rows = []
    costs_by_size = {size: measure_costs(model, images[:size], arguments.rounds) for size in arguments.batch_sizes}
    for drop in arguments.drops:
        promise = CalibrationTarget(max_accuracy_drop=drop, confidence=arguments.confidence, bound=arguments.bound)
        for size, costs in costs_by_size.items():
            by_exit = {name: values.tolist() for name, values in asdict(costs).items()}
            rows.append({"batch_size": size, **by_exit, **compare(runs, promise, costs, policy)})
    print(f"\n{table_of(rows)}")
    if arguments.output:
        content = {**asdict(arguments), "output": None, "rows": rows, "environment": environment_info()}
        Path(arguments.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"exit_subsets.py: error: {error}")
