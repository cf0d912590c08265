# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the alarm of a `PromiseMonitor` comes in time, on photos that get blurred or darkened step by step.

    python training/degrading_photos.py --run runs/grocery --data PATH --half first [--output degrading_photos.json]

The run, an output directory of `train.py`, is calibrated on one half of the test images, for each of `TARGETS`. A
stream of images is drawn from the other half, at random with replacement: a sixth of it as they are, and five sixths
each more blurred, or darker, than the one before. A share of them is audited, without labels; where a drop of accuracy
was promised, also with them, as if they came at once. What is told of the alarm: how far in the stream it comes, and
what early exit had lost until then, in truth: images harmed less images corrected, as a share of all images of the
stream so far. In time is an alarm before that share has reached 1 %, which is looked at after each sixth of the stream
and at the alarm.

The images that are watched choose nothing: neither thresholds nor limits, nor the strength of a step.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from transformers import HfArgumentParser

from measurements import images_of, independent_predictions, load
from modeling_mevit import CalibrationTarget, DataSource, PromiseMonitor
from modeling_mevit.data.datasets import HALVES
from modeling_mevit.data.image_processing import Transform
from modeling_mevit.early_exit.calibration import calibrate_predictions
from modeling_mevit.early_exit.predictions import ExitPredictions, predict_exits
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.tables import markdown_table


TARGETS = (
    CalibrationTarget(max_disagreement=0.02, confidence=0.95),
    CalibrationTarget(max_disagreement=0.05, confidence=0.95),
    CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95, bound="difference"),
)
TOO_LATE = 0.01  # share of the stream that early exit may cost until the alarm
CLEAN = "clean"


def blur(image: Image.Image, share: float) -> Image.Image:
    """Blurs by a Gaussian whose radius is this share of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))


def darken(image: Image.Image, factor: float) -> Image.Image:
    """Multiplies all values, which stay whole numbers of 8 bits."""
    return ImageEnhance.Brightness(image).enhance(factor)


# what gets worse → how, and the steps
CHANGES: dict[str, tuple[Callable[[Image.Image, float], Image.Image], tuple[float, ...]]] = {
    "blurred": (blur, (0.0025, 0.005, 0.01, 0.02, 0.04)),
    "darkened": (darken, (0.7, 0.5, 0.35, 0.25, 0.15)),
}


@dataclass
class DegradingArguments:
    """Which run is watched, on what."""

    run: str = field(metadata={"help": "Output directory of train.py, of a MEViT."})
    data: str = field(metadata={"help": "The data set, as train.py reads it."})
    half: str = field(
        metadata={"help": "Half of the test images that is watched, 'first' or 'second'; the other one calibrates."}
    )
    policy: str = field(default="confidence", metadata={"help": "Exit policy."})
    audits: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.2], metadata={"help": "Shares to audit."})
    images: int = field(default=300_000, metadata={"help": "Images of a stream."})
    streams: int = field(default=100, metadata={"help": "Streams of each setting."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        if self.half not in HALVES:
            raise ValueError(f"half must be {' or '.join(map(repr, HALVES))}, got {self.half!r}")


@dataclass(frozen=True)
class Step:
    """What early exit does to the test images in one condition.

    Args:
        name: such as "blurred 0.01".
        differs: (N,), bool, whether early exit gives another label than the full run.
        lost: (N,), int64, 1 where it harms, −1 where it corrects, else 0.
        accuracy: of the full run.
        cost: mean.
    """

    name: str
    differs: np.ndarray
    lost: np.ndarray
    accuracy: float
    cost: float


def predict_changed(run: Path, source: DataSource) -> dict[str, ExitPredictions]:
    """What every exit says of the images of a source, as they are and under each step of each change."""
    model, predictions = load(run), {}
    images = images_of(source, run)
    plain = images.transform
    predictions[CLEAN] = predict_exits(model, images)
    for name, (change, steps) in CHANGES.items():
        for strength in steps:
            images.transform = partial(_changed, plain, change, strength)
            predictions[f"{name} {strength}"] = predict_exits(model, images)
    return predictions


def _changed(
    transform: Transform, change: Callable[[Image.Image, float], Image.Image], strength: float, image: Image.Image
) -> torch.Tensor:
    return transform(change(image, strength))


def step_of(name: str, predictions: ExitPredictions, policy: str, thresholds: list[float]) -> Step:
    """What early exit under some thresholds does to each image."""
    indices = predictions.exit_indices(policy, thresholds)
    point = predictions.operating_point(policy, thresholds, indices)
    taken = predictions.correct[np.arange(len(predictions)), indices]
    lost = predictions.correct[:, -1].astype(np.int64) - taken
    return Step(name, predictions.disagrees(indices), lost, point.full_model_accuracy, point.cost)


def watch(
    steps: list[Step],
    calibration: dict[str, Any],
    audit: float,
    num_images: int,
    rng: np.random.Generator,
    labelled: bool = False,
) -> dict[str, Any]:
    """Watches one stream, whose images come from each step in turn.

    Args:
        steps: what early exit does to the images, step after step.
        calibration: what is watched.
        audit: share of the images.
        num_images: of the stream.
        rng: draws the images, and the seed of the audit.
        labelled: whether audited images have labels.

    Returns:
        `alarm`, the number of images until then, None where there is none; `audited` until then, or until the end;
        `cost`, the share of those images that early exit lost; `largest`, the largest that this share has been
        at the end of a step or at the alarm; and `step`, the place of the step.
    """
    monitor = PromiseMonitor.from_calibration(calibration, audit=audit, seed=int(rng.integers(2**32)))
    length, lost, seen, largest = num_images // len(steps), 0, 0, -math.inf
    for place, step in enumerate(steps):
        drawn = rng.integers(len(step.lost), size=length)
        audited = np.flatnonzero(monitor.draw(length))
        before = monitor.counts["audited"]
        early, full, labels = answers_of(step, drawn[audited])
        monitor.update(early, full)
        if labelled:
            monitor.update_labels(early, full, labels)
        alarms = [verdict.alarm_at for verdict in (monitor.disagreement, monitor.accuracy_drop)]
        if tested := min((alarm for alarm in alarms if alarm is not None), default=None):
            position = int(audited[tested - before - 1])
            alarm = seen + position + 1
            cost = (lost + int(step.lost[drawn[: position + 1]].sum())) / alarm
            found = {"alarm": alarm, "audited": tested, "step": place}
            return {**found, "cost": cost, "largest": max(largest, cost)}
        lost += int(step.lost[drawn].sum())
        seen += length
        largest = max(largest, lost / seen)
    found = {"alarm": None, "audited": monitor.counts["audited"], "step": None}
    return {**found, "cost": lost / seen, "largest": largest}


def answers_of(step: Step, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of early exit, of the full run, and true ones that differ and harm as those of a step's images do."""
    early, lost = step.differs[images].astype(np.int64), step.lost[images]
    full = np.zeros_like(early)
    return early, full, np.choose(lost + 1, (early, np.full_like(early, 2), full))


def summary(alarms: list[dict[str, Any]], steps: list[Step], num_images: int) -> dict[str, Any]:
    """Of the streams of one setting: how many alarms came, came in time, or came while nothing had changed."""
    found = [one for one in alarms if one["alarm"] is not None]
    middle = float(np.median([one["alarm"] for one in found])) if found else None
    return {
        "alarms": len(found) / len(alarms),
        "in_time": sum(one["largest"] < TOO_LATE for one in alarms) / len(alarms),
        "clean": sum(one["step"] == 0 for one in found) / len(alarms),
        "median_alarm": middle,
        "median_audited": float(np.median([one["audited"] for one in found])) if found else None,
        "median_step": None
        if middle is None
        else steps[min(int(middle * len(steps) / num_images), len(steps) - 1)].name,
        "median_cost": float(np.median([one["cost"] for one in alarms])),
        "largest_cost": max(one["largest"] for one in alarms),
    }


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown: what each step does, and when alarms come."""
    steps = [
        (
            one["claim"],
            f"{one['limit']:.2%}",
            step["name"],
            f"{step['accuracy']:.1%}",
            f"{step['drop']:+.2%}",
            f"{step['disagreement']:.2%}",
            f"{step['cost']:.3f}",
        )
        for one in results["targets"]
        for step in one["steps"]
    ]
    alarms = [
        (
            one["claim"],
            row["change"],
            f"{row['audit']:.0%}{', labelled' * row['labelled']}",
            f"{row['alarms']:.0%}",
            f"{row['clean']:.0%}",
            None
            if row["median_alarm"] is None
            else f"{row['median_alarm']:.0f} ({row['median_audited']:.0f} audited)",
            row["median_step"],
            f"{row['median_cost']:+.2%}",
            f"{row['largest_cost']:+.2%}",
            f"{row['in_time']:.0%}",
        )
        for one in results["targets"]
        for row in one["alarms"]
    ]
    of_steps = ("calibrated for", "limit of disagreement", "images", "last exit", "drop", "disagreement", "mean cost")
    of_alarms = ("calibrated for", "images get", "audited", "alarms", "before any change", "median image", "at step")
    costs = ("lost until then, median", "largest", "in time")
    return f"{markdown_table(of_steps, steps)}\n\n{markdown_table((*of_alarms, *costs), alarms)}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Calibrates, degrades, watches, and prints the tables. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(DegradingArguments).parse_args_into_dataclasses(argv)
    run = Path(arguments.run)
    model = load(run)
    results: dict[str, Any] = {
        **{name: getattr(arguments, name) for name in ("half", "policy", "images", "streams", "seed")},
        "run": run.resolve().name,
        "too_late": TOO_LATE,
        "targets": [],
        "environment": environment_info(),
    }
    (other,) = set(HALVES) - {arguments.half}
    calibrating, _ = independent_predictions(model, run, DataSource(arguments.data, "test", other))
    predictions = predict_changed(run, DataSource(arguments.data, "test", arguments.half))
    for target in TARGETS:
        found = calibrate_predictions(calibrating, target, policy=arguments.policy, num_labels=model.config.num_labels)
        print(found)
        if found.operating_point is None:
            continue
        found.apply_to(model.config)
        thresholds, calibration = model.config.exit_thresholds, model.config.calibration
        steps = {name: step_of(name, one, arguments.policy, thresholds) for name, one in predictions.items()}
        monitor = PromiseMonitor.from_calibration(calibration)
        alarms = []
        for (change, (_, strengths)), audit, labelled in product(
            CHANGES.items(), arguments.audits, (False, True) if target.needs_labels else (False,)
        ):
            stream = [steps[CLEAN], *(steps[f"{change} {strength}"] for strength in strengths)]
            rng = np.random.default_rng([arguments.seed, round(audit * 1e4), len(change)])
            watched = [
                watch(stream, calibration, audit, arguments.images, rng, labelled) for _ in range(arguments.streams)
            ]
            told = summary(watched, stream, arguments.images)
            alarms.append({"change": change, "audit": audit, "labelled": labelled, **told})
        results["targets"].append(
            {
                "claim": target.claim,
                "limit": monitor.disagreement.limit,
                "allowed": monitor.disagreement.allowed,
                "calibration": {name: calibration[name] for name in ("target", "operating_point")},
                "steps": [
                    {
                        "name": step.name,
                        "accuracy": step.accuracy,
                        "drop": float(step.lost.mean()),
                        "disagreement": float(step.differs.mean()),
                        "cost": step.cost,
                    }
                    for step in steps.values()
                ],
                "alarms": alarms,
            }
        )
    print(f"\n{tables(results)}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"degrading_photos.py: error: {error}")
