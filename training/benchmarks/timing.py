# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: times of runs in turn, peak memory of fresh processes, models with random weights."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from tqdm.auto import tqdm

from modeling_mevit import MEViTConfig, MEViTForImageClassification


MODELS = {
    "vit_base_16": {"image_size": 224},
    "vit_small_14": {
        "image_size": 112,
        "patch_size": 14,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    },
}
WARM_UP_ROUNDS = 2


def make_model(name: str, num_labels: int, image_size: int | None = None) -> MEViTForImageClassification:
    """One of `MODELS` with random weights, in eval mode, for images of its own size or another."""
    torch.manual_seed(0)
    settings = {**MODELS[name], **({"image_size": image_size} if image_size else {})}
    return MEViTForImageClassification(MEViTConfig(**settings, num_labels=num_labels)).eval()


def times_in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, description: str | None = None
) -> dict[str, list[float]]:
    """Seconds that each run takes, `rounds` of them, after two rounds that are not counted.

    All take turns, every other round in reverse, so that what slows the machine down for a while slows all of them.

    Args:
        runs: name → what is timed.
        rounds: that are counted.
        description: of a progress bar; None for none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(WARM_UP_ROUNDS + rounds), desc=description, unit="round", disable=description is None):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            runs[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[WARM_UP_ROUNDS:] for name, taken in seconds.items()}


def median_ratio(ours: Sequence[float], plain: Sequence[float]) -> dict[str, float | list[float]]:
    """`relative_latency`, the median of the ratios of times that were taken in the same round, and its `quartiles`."""
    ratios = sorted(own / theirs for own, theirs in zip(ours, plain, strict=True))
    quartile = len(ratios) // 4
    return {"relative_latency": median(ratios), "quartiles": [ratios[quartile], ratios[-1 - quartile]]}


def peak_memory(script: str, *options: str) -> float:
    """Peak memory in MiB of a fresh process that runs a script, which prints it last."""
    # glibc would keep freed tensors of up to 32 MB in a heap that breaks into fragments; this gives them back, so that
    # what is measured is memory in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, str(Path(script).resolve()), *options]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(result.stdout.split()[-1])
