# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares trained models on the same images, with a 95 % paired bootstrap interval of each difference.

    python training/compare_runs.py --baseline runs/vit --runs runs/mevit

Each directory is the output of `train.py`. Several directories on a side are seeds of one recipe: accuracies are their
mean and standard deviation, and an image counts with the fraction of seeds that get it right.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import bootstrap
from transformers import HfArgumentParser

from modeling_mevit.reports.tables import markdown_table


@dataclass
class CompareRunsArguments:
    """Which runs are compared, and on what."""

    baseline: list[str] = field(metadata={"help": "Output directories whose last exit is compared with."})
    runs: list[str] = field(metadata={"help": "Output directories of which every exit is compared."})
    split: str = field(
        default="test", metadata={"help": "'test', or 'validation', to choose a recipe by, without the test images."}
    )
    resamples: int = field(default=10_000, metadata={"help": "Bootstrap samples of the images."})

    def __post_init__(self):
        if self.split not in ("test", "validation"):
            raise ValueError(f"split must be 'test' or 'validation', got {self.split!r}")


def correct_predictions(directories: Sequence[str | Path], split: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Reads the predictions on a split from each directory.

    Returns:
        The exit layers; which predictions are right, (seeds, N, E); the labels, (N,).
    """
    files = [json.loads(Path(directory, f"{split}_predictions.json").read_text()) for directory in directories]
    for directory, file in zip(directories, files, strict=True):
        for name in ("exit_layers", "labels"):
            if file[name] != files[0][name]:
                raise ValueError(f"{directory} must have the same {name} as {directories[0]}, and has others")
    labels = np.array(files[0]["labels"])
    right = np.stack([np.array(file["predictions"]) == labels[:, None] for file in files])
    return files[0]["exit_layers"], right, labels


def paired_interval(difference: np.ndarray, resamples: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `difference`, (N,), one value an image. Seeded."""
    if not difference.any():
        return 0.0, 0.0
    result = bootstrap((difference,), np.mean, n_resamples=resamples, method="percentile", rng=0, batch=1000)
    low, high = result.confidence_interval
    return float(low), float(high)


def compare_exits(
    baseline: Sequence[str | Path], runs: Sequence[str | Path], split: str, resamples: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Every exit of `runs` against the last exit of `baseline`.

    Returns:
        The baseline's accuracy for each seed; one row for each exit: `exit`, `seeds` (accuracy for each), `accuracy`
        and `std` over them (None of one), `difference` and its `interval`. All are fractions, not per cent.

    Raises:
        ValueError: if directories were measured on different images or have different exits.
    """
    _, base, base_labels = correct_predictions(baseline, split)
    layers, right, labels = correct_predictions(runs, split)
    if not np.array_equal(labels, base_labels):
        raise ValueError(f"{runs[0]} must be measured on the same images as {baseline[0]}, and has other labels")
    plain = base[:, :, -1]  # (seeds, N)
    rows = []
    for place, layer in enumerate(layers):
        seeds = right[:, :, place].mean(1)
        difference = right[:, :, place].mean(0) - plain.mean(0)  # (N,)
        rows.append(
            {
                "exit": layer,
                "seeds": seeds.tolist(),
                "accuracy": float(seeds.mean()),
                "std": float(seeds.std(ddof=1)) if len(seeds) > 1 else None,
                "difference": float(difference.mean()),
                "interval": paired_interval(difference, resamples),
            }
        )
    return plain.mean(1).tolist(), rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints the table of all exits. Returns the rows of [`compare_exits`]."""
    (arguments,) = HfArgumentParser(CompareRunsArguments).parse_args_into_dataclasses(argv)
    plain, rows = compare_exits(arguments.baseline, arguments.runs, arguments.split, arguments.resamples)
    print(f"baseline: {mean_and_std(plain)}\n")
    cells = []
    for row in rows:
        low, high = (f"{100 * end:+.1f}" for end in row["interval"])
        cells.append((row["exit"], mean_and_std(row["seeds"]), f"{100 * row['difference']:+.1f}", f"{low} … {high}"))
    print(markdown_table(("exit", "accuracy (%)", "difference (points)", "95 % interval"), cells))
    return rows


def mean_and_std(seeds: Sequence[float], sign: Literal["", "+"] = "") -> str:
    """In per cent: the mean, with a sign where it is a difference, and the standard deviation where there are several
    seeds."""
    spread = f" ± {100 * np.std(seeds, ddof=1):.1f}" if len(seeds) > 1 else ""
    return f"{100 * np.mean(seeds):{sign}.1f}{spread}"


if __name__ == "__main__":
    main()
