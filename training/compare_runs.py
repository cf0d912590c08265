# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares trained models on the same photos, with a 95 % paired bootstrap interval of each difference.

    python training/bootstrap.py --baseline runs/vit --runs runs/mevit

Each directory is the output of `train.py`. Several directories on a side are seeds of one recipe: accuracies are their
mean and standard deviation, and a photo counts with the share of seeds that get it right.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap
from transformers import HfArgumentParser


@dataclass
class BootstrapArguments:
    baseline: list[str] = field(metadata={"help": "Output directories whose last exit is compared with."})
    runs: list[str] = field(metadata={"help": "Output directories of which every exit is compared."})
    split: str = field(
        default="test", metadata={"help": "'test', or 'validation', for a recipe is chosen without the test photos."}
    )
    resamples: int = field(default=10_000, metadata={"help": "Bootstrap samples of the photos."})

    def __post_init__(self):
        if self.split not in ("test", "validation"):
            raise ValueError(f"split={self.split!r} is neither 'test' nor 'validation'.")


def correct_predictions(directories: list[str], split: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Reads the predictions on a split from each directory.

    Returns:
        The exit layers; which predictions are right, (seeds, N, E); the labels, (N,).
    """
    files = [json.loads(Path(directory, f"{split}_predictions.json").read_text()) for directory in directories]
    for directory, file in zip(directories, files, strict=True):
        for name in ("exit_layers", "labels"):
            if file[name] != files[0][name]:
                raise ValueError(f"{directory} was measured on other {name} than {directories[0]}.")
    labels = np.array(files[0]["labels"])
    right = np.stack([np.array(file["predictions"]) == labels[:, None] for file in files])
    return files[0]["exit_layers"], right, labels


def paired_interval(difference: np.ndarray, resamples: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `difference`, (N,), one value a photo. Seeded."""
    if not difference.any():
        return 0.0, 0.0
    result = bootstrap((difference,), np.mean, n_resamples=resamples, method="percentile", rng=0, batch=1000)
    return tuple(result.confidence_interval)


def compare_exits(baseline: list[str], runs: list[str], split: str, resamples: int) -> tuple[list[float], list[dict]]:
    """Every exit of `runs` against the last exit of `baseline`.

    Returns:
        The baseline's accuracy for each seed; one row for each exit: `exit`, `seeds` (accuracy for each), `accuracy`
        and `std` over them (None of one), `difference` and its `interval`. All are shares, not per cent.

    Raises:
        ValueError: where directories were measured on different photos or have different exits.
    """
    _, base, base_labels = correct_predictions(baseline, split)
    layers, right, labels = correct_predictions(runs, split)
    if not np.array_equal(labels, base_labels):
        raise ValueError(f"{runs[0]} was measured on other photos than {baseline[0]}.")
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


def main(argv: list[str] | None = None) -> list[dict]:
    """Prints the table of all exits. Returns the rows of [`compare_exits`]."""
    (arguments,) = HfArgumentParser(BootstrapArguments).parse_args_into_dataclasses(argv)
    plain, rows = compare_exits(arguments.baseline, arguments.runs, arguments.split, arguments.resamples)
    print(f"baseline: {mean_and_std(plain)}\n")
    print("| exit | accuracy (%) | difference (points) | 95 % interval |\n| --- | --- | --- | --- |")
    for row in rows:
        low, high = (f"{100 * end:+.1f}" for end in row["interval"])
        accuracy = mean_and_std(row["seeds"])
        print(f"| {row['exit']} | {accuracy} | {100 * row['difference']:+.1f} | {low} … {high} |")
    return rows


def mean_and_std(seeds: list[float]) -> str:
    """In per cent: the mean, and the standard deviation where there are several seeds."""
    spread = f" ± {100 * np.std(seeds, ddof=1):.1f}" if len(seeds) > 1 else ""
    return f"{100 * np.mean(seeds):.1f}{spread}"


if __name__ == "__main__":
    main()
