# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of early exit, relative to the plain ViT.

    python training/benchmark_early_exit.py [--output benchmark_early_exit.json]

The library's plain ViT and MEViT share random weights (which matter for neither measure) in one process. Each ratio is
the median over pairs of runs taken in turn, on images of noise:

- `fixed_exit`: the model cut at its earliest exit;
- `never_taken`: early exit under thresholds that nothing is below;
- `spread_evenly`: early exit under thresholds that let the same number of images leave at each exit, one image
  after another at batch 1; its ratio is given relative to its mean cost too.

Memory: maximum resident set of a fresh process each, early exit spread evenly.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import HfArgumentParser

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.early_exit.cost import mean_cost
from modeling_mevit.early_exit.evaluation import plain_vit
from modeling_mevit.reports.environment import peak_rss_mib


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


@dataclass
class BenchmarkArguments:
    models: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": "'vit_base_16', 'vit_small_14'."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Images at a time."})
    num_labels: int = field(default=200, metadata={"help": "Number of classes."})
    pairs: int = field(default=20, metadata={"help": "Timed pairs, after two that are not timed."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    only: str | None = field(default=None, metadata={"help": "'plain' or 'early_exit': run it, print its memory."})

    def __post_init__(self):
        unknown = set(self.models) - set(MODELS)
        if unknown:
            raise ValueError(f"models={self.models} are unknown; allowed are {list(MODELS)}.")


def make_model(name: str, num_labels: int, image_size: int | None = None) -> MEViTForImageClassification:
    """One of `MODELS` with random weights, for images of its own size or another."""
    torch.manual_seed(0)
    settings = {**MODELS[name], **({"image_size": image_size} if image_size else {})}
    return MEViTForImageClassification(MEViTConfig(**settings, num_labels=num_labels)).eval()


def noise(model: MEViTForImageClassification, images: int) -> Tensor:
    size = model.config.image_size
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def thresholds_that_spread(scores: Tensor) -> list[float]:
    """Thresholds, midway between scores (B, E), under which the same share of these images leaves at each exit."""
    scores = scores.double()
    thresholds = []
    for place in range(scores.shape[1] - 1):
        at_this_exit = round(len(scores) / (scores.shape[1] - place))
        ascending = scores[:, place].sort().values
        last = len(ascending) - 1
        low, high = ascending[max(at_this_exit - 1, 0)], ascending[min(at_this_exit, last)]
        thresholds.append(((low + high) / 2).item() if at_this_exit else -math.inf)
        scores = scores[scores[:, place] >= thresholds[-1]]
    return thresholds


@torch.no_grad()
def ratio_of(ours: Callable[[], object], plain: Callable[[], object], pairs: int) -> dict[str, float]:
    """Median and quartiles of the time of `ours` relative to that of `plain`, run in turn."""

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    for _ in range(2):
        ours(), plain()
    ratios = []
    for pair in range(pairs):  # which one goes first alternates
        taken = {run: seconds(run) for run in ((ours, plain) if pair % 2 else (plain, ours))}
        ratios.append(taken[ours] / taken[plain])
    ratios.sort()
    quartile = len(ratios) // 4
    return {"time": median(ratios), "quartiles": [ratios[quartile], ratios[-1 - quartile]]}


def measure(name: str, batch_size: int, arguments: BenchmarkArguments) -> dict[str, dict[str, float]]:
    """All ratios of one model and batch size."""
    model = make_model(name, arguments.num_labels)
    plain, first = plain_vit(model), model.truncate(model.config.exit_layers[0])
    num_exits = len(model.config.exit_layers)
    batch = noise(model, batch_size)
    results = {
        "fixed_exit": ratio_of(lambda: first(batch), lambda: plain(batch), arguments.pairs),
        "never_taken": ratio_of(
            lambda: model(batch, early_exit=True, exit_thresholds=-math.inf), lambda: plain(batch), arguments.pairs
        ),
    }
    # at batch 1 one image for each exit, one after another
    images = noise(model, num_exits if batch_size == 1 else batch_size)
    with torch.no_grad():
        thresholds = thresholds_that_spread(model(images).exit_scores)
    batches = images.split(batch_size)

    def spread() -> list[int]:
        taken = [model(one, early_exit=True, exit_thresholds=thresholds).exit_layer for one in batches]
        return torch.cat(taken).tolist()

    with torch.no_grad():
        cost = mean_cost(spread(), model.config)
    results["spread_evenly"] = ratio_of(spread, lambda: [plain(one) for one in batches], arguments.pairs)
    results["spread_evenly"] |= {"cost": cost, "time_by_cost": results["spread_evenly"]["time"] / cost}
    return results


def peak_memory(kind: str, name: str, arguments: BenchmarkArguments) -> float:
    """Maximum resident set in MiB of a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), f"--only={kind}", f"--models={name}"]
    command += ["--batch_sizes", str(max(arguments.batch_sizes)), "--num_labels", str(arguments.num_labels)]
    # glibc would keep freed tensors of up to 32 MB in a heap that breaks into fragments; this gives them back, so that
    # what is measured is memory in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(result.stdout.split()[-1])


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    """Measures and prints all ratios. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    if arguments.only:
        model = make_model(arguments.models[0], arguments.num_labels)
        batch = noise(model, arguments.batch_sizes[0])
        plain = plain_vit(model)
        # both kinds choose thresholds, image by image so that it takes no memory
        thresholds = thresholds_that_spread(torch.cat([model(image[None]).exit_scores for image in batch]))
        for _ in range(3):
            if arguments.only == "plain":
                plain(batch)
            else:
                model(batch, early_exit=True, exit_thresholds=thresholds)
        print(peak())
        return {}

    results = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: value for name, value in asdict(arguments).items() if name not in ("output", "only")},
    }
    for name in arguments.models:
        for batch_size in arguments.batch_sizes:
            results[f"{name}/batch_{batch_size}"] = measured = measure(name, batch_size, arguments)
            times = ", ".join(f"{kind} {ratio['time']:.3f}" for kind, ratio in measured.items())
            by_cost = measured["spread_evenly"]["time_by_cost"]
            print(f"{name}, batch {batch_size}: {times} ({by_cost:.3f} of its mean cost)", flush=True)
        memory = {kind: peak_memory(kind, name, arguments) for kind in ("plain", "early_exit")}
        results[f"{name}/memory"] = memory["early_exit"] / memory["plain"]
        print(f"{name}: peak memory {results[f'{name}/memory']:.3f}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
