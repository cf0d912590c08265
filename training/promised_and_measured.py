# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What early exit was promised to lose on one half of the test images, and what it lost on the other.

    python training/promised_and_measured.py --runs runs/mevit-seed0 … --plain runs/vit-seed0 … --data PATH

Each run is calibrated on one half and measured on the other, then the other way round, for each of `TARGETS`, with and
without labels. With `--calibrate_on validation`, those images calibrate, and all test images are measured. Runs are
output directories of `train.py`, one for each seed. It prints a table and, with `--output`, writes every single
result.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser

from compare_runs import mean_and_std
from measurements import images_of, independent_predictions, load
from modeling_mevit import CalibrationTarget, DataSource, MEViTConfig
from modeling_mevit.data.datasets import HALVES
from modeling_mevit.early_exit.calibration import calibrate_predictions
from modeling_mevit.early_exit.evaluation import classifier_accuracy
from modeling_mevit.early_exit.predictions import ExitPredictions, OperatingPoint
from modeling_mevit.exit_policy_mevit import EXIT_POLICIES
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.tables import markdown_table


TARGETS = [
    *(
        CalibrationTarget(max_accuracy_drop=drop, confidence=0.95, bound=bound)
        for bound in ("harm", "difference")
        for drop in (0.01, 0.02)
    ),
    *(CalibrationTarget(max_disagreement=share, confidence=0.95) for share in (0.01, 0.02, 0.05)),
    CalibrationTarget(max_accuracy_drop=0.01, guarantee="expectation"),
    CalibrationTarget(max_disagreement=0.01, guarantee="expectation"),
]


@dataclass
class PromiseArguments:
    """Which runs are calibrated, and on what."""

    runs: list[str] = field(metadata={"help": "Output directories of train.py, of a MEViT; one for each seed."})
    plain: list[str] = field(metadata={"help": "Those of the plain ViT, in the order of their seeds."})
    data: str = field(metadata={"help": "The data set, as train.py reads it; its test split is halved."})
    policy: str = field(default="confidence", metadata={"help": "Exit policy."})
    calibrate_on: str | None = field(
        default=None, metadata={"help": "Split that calibrates; by default each half of test, for the other one."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        if len(self.runs) != len(self.plain):
            raise ValueError(f"plain must have as many runs as runs, {len(self.runs)}, got {len(self.plain)}")
        if self.policy not in EXIT_POLICIES:
            raise ValueError(f"policy must be one of {', '.join(EXIT_POLICIES)}, got {self.policy!r}")


@dataclass(frozen=True)
class Pair:
    """Images that calibrate, and others that are measured, as a run sees them.

    Args:
        calibrated_on: which images calibrate.
        calibrating: predictions on those of them that can, each image once.
        measured: predictions on the others.
        plain_accuracy: on these, of the plain ViT of the same seed.
    """

    calibrated_on: str
    calibrating: ExitPredictions
    measured: ExitPredictions
    plain_accuracy: float


@dataclass(frozen=True)
class Measurement:
    """What a target gave: calibrated on one half, measured on the other.

    Args:
        run: name of its directory.
        target: what was promised.
        calibrated_on: which images, `"first"` or `"second"` half of test or a split.
        num_calibrating: images that calibrated.
        plain_accuracy: of the plain ViT on the images measured.
        full_model_accuracy: of the last exit there.
        measured: of early exit there; None where nothing was certified, so that early exit stays off.
    """

    run: str
    target: CalibrationTarget
    calibrated_on: str
    num_calibrating: int
    plain_accuracy: float
    full_model_accuracy: float
    measured: OperatingPoint | None

    @property
    def lost(self) -> float:
        """What the target bounds: the drop of accuracy, or the disagreement; 0 where early exit stays off."""
        point = self.measured
        if point is None:
            return 0.0
        return point.drop if self.target.needs_labels else point.disagreement


def pairs_of(run: Path, plain: Path, data: str, calibrate_on: str | None) -> list[Pair]:
    """What a run and the plain ViT predict: both ways round for the halves of test, or a split and all of test."""
    model, plain_model = load(run), load(plain)

    def seen(split: str, half: str | None = None) -> tuple[ExitPredictions, ExitPredictions]:
        """Predictions on images that can calibrate, and on all of them."""
        return independent_predictions(model, run, DataSource(data, split, half))

    def plain_accuracy(half: str | None) -> float:
        return classifier_accuracy(plain_model, images_of(DataSource(data, "test", half), plain))

    if calibrate_on is not None:
        return [Pair(calibrate_on, seen(calibrate_on)[0], seen("test")[1], plain_accuracy(None))]
    halves = {half: seen("test", half) for half in HALVES}
    return [
        Pair(half, halves[half][0], halves[other][1], plain_accuracy(other))
        for half, other in zip(HALVES, reversed(HALVES), strict=True)
    ]


def measure(run: str, pairs: list[Pair], target: CalibrationTarget, policy: str, num_labels: int) -> list[Measurement]:
    """Calibrates and measures each pair."""
    results = []
    for pair in pairs:
        chosen = calibrate_predictions(pair.calibrating, target, policy=policy, num_labels=num_labels).operating_point
        results.append(
            Measurement(
                run=run,
                target=target,
                calibrated_on=pair.calibrated_on,
                num_calibrating=len(pair.calibrating),
                plain_accuracy=pair.plain_accuracy,
                full_model_accuracy=float(pair.measured.correct[:, -1].mean()),
                measured=chosen and pair.measured.simulate(policy, chosen.thresholds),
            )
        )
    return results


def table_of(measurements: list[Measurement]) -> str:
    """Markdown: a row for each target, means and standard deviations over runs and what calibrated them."""
    rows = []
    for target in dict.fromkeys(measurement.target for measurement in measurements):
        of_target = [measurement for measurement in measurements if measurement.target == target]
        certified = [(one, one.measured) for one in of_target if one.measured is not None]
        above = sum(one.lost > target.limit for one in of_target)
        cells: list[str | None] = [None] * 5
        if certified:
            cells = [
                mean_and_std([point.accuracy for _, point in certified]),
                mean_and_std([point.accuracy - one.plain_accuracy for one, point in certified], sign="+"),
                mean_and_std([point.drop for _, point in certified], sign="+"),
                mean_and_std([point.disagreement for _, point in certified]),
                f"{np.mean([point.cost for _, point in certified]):.3f}",
            ]
        bound = f", {target.bound}" if target.bound else ""
        rows.append((f"{target.claim}{bound}", f"{len(certified)} of {len(of_target)}", *cells, above))
    header = ("promised", "certified", "early exit (%)", "against the plain ViT", "drop", "disagreement (%)")
    return markdown_table((*header, "mean cost", "above the promise"), rows)


def main(argv: list[str] | None = None) -> list[Measurement]:
    """Measures every target on every run, prints the table. Returns the single results."""
    (arguments,) = HfArgumentParser(PromiseArguments).parse_args_into_dataclasses(argv)
    measurements = []
    for run, plain in zip(map(Path, arguments.runs), map(Path, arguments.plain), strict=True):
        pairs = pairs_of(run, plain, arguments.data, arguments.calibrate_on)
        num_labels = MEViTConfig.from_pretrained(run).num_labels
        for target in TARGETS:
            measurements += measure(run.resolve().name, pairs, target, arguments.policy, num_labels)
    print(f"\n{table_of(measurements)}")
    if arguments.output:
        content = {
            "policy": arguments.policy,
            "results": [
                {**vars(one), "target": one.target.to_dict(), "measured": one.measured and one.measured.to_dict()}
                for one in measurements
            ],
            "environment": environment_info(),
        }
        Path(arguments.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return measurements


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"promised_and_measured.py: error: {error}")
