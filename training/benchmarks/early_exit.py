# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of early exit, relative to the plain ViT.

    python training/benchmarks/early_exit.py [--dtype bfloat16] [--output early_exit.json]

The plain ViT of Transformers and MEViT share random weights (which matter for neither measure) in one process. Each
ratio is the median over pairs of runs taken in turn, on images of noise:

- `fixed_exit`: the model cut at its earliest exit;
- `never_taken`: early exit under thresholds that nothing can be below, so that exits are not computed;
- `computed_in_vain`: early exit under thresholds that no score of these images is below;
- `spread_evenly`: early exit under thresholds that let the same number of images leave at each exit, one image
  after another at batch 1; its ratio is given relative to its mean cost too;
- `fixed_exit_by_float32`, in another precision: the model cut at its earliest exit, by the plain ViT in float32.

Memory: maximum resident set of a fresh process each, early exit spread evenly.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from modeling_mevit import MEViTForImageClassification
from modeling_mevit.early_exit.cost import mean_cost
from modeling_mevit.reports.environment import peak_rss_mib
from timing import MODELS, make_model, median_ratio, peak_memory, times_in_turn


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class EarlyExitBenchmarkArguments:
    """What is measured."""

    models: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": "'vit_base_16', 'vit_small_14'."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Images at a time."})
    num_labels: int = field(default=200, metadata={"help": "Number of classes."})
    dtype: str = field(default="float32", metadata={"help": "Precision of both, 'float32' or 'bfloat16'."})
    pairs: int = field(default=20, metadata={"help": "Timed pairs, after two that are not timed."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    only: str | None = field(default=None, metadata={"help": "'plain' or 'early_exit': run it, print its memory."})

    def __post_init__(self):
        unknown = set(self.models) - set(MODELS)
        if unknown:
            raise ValueError(f"models must be of {list(MODELS)}, got {self.models}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}")


def noise(model: MEViTForImageClassification, images: int) -> Tensor:
    """(images, 3, H, W) of what the model is for."""
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
def ratio_of(ours: Callable[[], object], plain: Callable[[], object], pairs: int) -> dict[str, Any]:
    """Median and quartiles of the time of `ours` relative to that of `plain`, run in turn."""
    seconds = times_in_turn({"ours": ours, "plain": plain}, pairs)
    return median_ratio(seconds["ours"], seconds["plain"])


def measure(name: str, batch_size: int, arguments: EarlyExitBenchmarkArguments) -> dict[str, dict[str, Any]]:
    """All ratios of one model and batch size."""
    model = make_model(name, arguments.num_labels)
    in_float32 = None if arguments.dtype == "float32" else copy.deepcopy(model).to_vit()
    model.to(DTYPES[arguments.dtype])
    plain, first = model.to_vit(), model.truncate(model.config.exit_layers[0])
    num_exits = len(model.config.exit_layers)
    batch = noise(model, batch_size)
    results = {
        "fixed_exit": ratio_of(lambda: first(batch), lambda: plain(batch), arguments.pairs),
        "never_taken": ratio_of(
            lambda: model(batch, early_exit=True, exit_thresholds=-math.inf), lambda: plain(batch), arguments.pairs
        ),
    }
    with torch.no_grad():
        below_all = model(batch).exit_scores.min().item() / 2
    results["computed_in_vain"] = ratio_of(
        lambda: model(batch, early_exit=True, exit_thresholds=below_all), lambda: plain(batch), arguments.pairs
    )
    if in_float32 is not None:
        results["fixed_exit_by_float32"] = ratio_of(lambda: first(batch), lambda: in_float32(batch), arguments.pairs)
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
    by_cost = results["spread_evenly"]["relative_latency"] / cost
    results["spread_evenly"] |= {"cost": cost, "relative_latency_by_cost": by_cost}
    return results


def memory_of(kind: str, name: str, arguments: EarlyExitBenchmarkArguments) -> float:
    """Peak memory in MiB of a fresh process."""
    batch_size = str(max(arguments.batch_sizes))
    options = ["--batch_sizes", batch_size, "--num_labels", str(arguments.num_labels), "--dtype", arguments.dtype]
    return peak_memory(__file__, f"--only={kind}", f"--models={name}", *options)


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints all ratios. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(EarlyExitBenchmarkArguments).parse_args_into_dataclasses(argv)
    if arguments.only:
        model = make_model(arguments.models[0], arguments.num_labels).to(DTYPES[arguments.dtype])
        batch = noise(model, arguments.batch_sizes[0])
        plain = model.to_vit()
        # both kinds choose thresholds, image by image so that it takes no memory
        thresholds = thresholds_that_spread(torch.cat([model(image[None]).exit_scores for image in batch]))
        for _ in range(3):
            if arguments.only == "plain":
                plain(batch)
            else:
                model(batch, early_exit=True, exit_thresholds=thresholds)
        print(peak_rss_mib())
        return {}

    results = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: value for name, value in asdict(arguments).items() if name not in ("output", "only")},
    }
    for name in arguments.models:
        for batch_size in arguments.batch_sizes:
            results[f"{name}/batch_{batch_size}"] = measured = measure(name, batch_size, arguments)
            times = ", ".join(f"{kind} {ratio['relative_latency']:.3f}" for kind, ratio in measured.items())
            by_cost = measured["spread_evenly"]["relative_latency_by_cost"]
            print(f"{name}, batch {batch_size}: {times} ({by_cost:.3f} of its mean cost)", flush=True)
        memory = {kind: memory_of(kind, name, arguments) for kind in ("plain", "early_exit")}
        results[f"{name}/memory"] = memory["early_exit"] / memory["plain"]
        print(f"{name}: peak memory {results[f'{name}/memory']:.3f}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
