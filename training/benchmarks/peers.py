# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit of earlyon (PyPI) and ours, on the same exits and images, in one process.

    pip install earlyon==0.3.0
    python training/benchmarks/peers.py [--output peers.json]

Both are a ViT-B/16 for 224 px with random weights and exits after layers 6 to 12: ours is a MEViT, earlyon's is
torchvision's ViT with `custom_ee`, which reads [CLS] too. Thresholds let the same number of images leave at each exit.

- `relative_latency`: time relative to the plain ViT of Transformers, in turn, for the images one by one and in one
  batch; `never_taken` under thresholds that stop nobody.
- `right`: of the images in the batch, how many come out with the exit and the label that they have one by one.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from early_exit import noise, thresholds_that_spread
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.tables import markdown_table
from timing import make_model, median_ratio, times_in_turn


# takes images (B, 3, H, W) and thresholds of the early exits' scores; gives the exits' places (B,) and labels (B,)
EarlyExit = Callable[[Tensor, list[float]], tuple[Tensor, Tensor]]


@dataclass
class PeersArguments:
    """What is measured."""

    images: int = field(default=32, metadata={"help": "Images of noise, which leave evenly at all exits."})
    num_labels: int = field(default=200, metadata={"help": "Number of classes."})
    rounds: int = field(default=6, metadata={"help": "Timed rounds, after two that are not timed."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def our_early_exit(model: Any) -> EarlyExit:
    """MEViT: images leave a batch one by one."""
    layers = torch.tensor(model.config.exit_layers)

    def run(images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
        outputs = model(images, early_exit=True, exit_thresholds=thresholds)
        return torch.searchsorted(layers, outputs.exit_layer), outputs.logits.argmax(-1)

    return run


def earlyon_early_exit(model: Any) -> EarlyExit:
    """earlyon: one image by `forward`, several by `forward_inference_batched`, which leave together."""
    last = len(model.config.exit_points)

    def run(images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
        model.config.confidence_thresholds[:] = [1 - threshold for threshold in thresholds]  # ours are low where sure
        if len(images) == 1:
            result = model(images, mode="inference")
            logits = result.prediction
        else:
            result = model.forward_inference_batched(images)
            logits = result.predictions
        place = last if result.exit_taken == -1 else result.exit_taken
        return torch.full((len(images),), place), logits.argmax(-1)

    return run


def make_earlyon(exit_layers: list[int], num_labels: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """earlyon's model, and what gives the scores (B, E) of all its exits, 1 − confidence."""
    from earlyon.models import custom_ee
    from torchvision.models import vit_b_16

    torch.manual_seed(0)
    backbone = vit_b_16(weights=None, num_classes=num_labels)
    torch.nn.init.trunc_normal_(backbone.heads.head.weight, std=0.02)  # torchvision's is 0, and all labels equal
    names = [f"encoder.layers.encoder_layer_{layer - 1}" for layer in exit_layers[:-1]]
    model = custom_ee(backbone, names, num_classes=num_labels, pool_tokens="cls").eval()

    def scores(images: Tensor) -> Tensor:
        logits = torch.stack(model(images, mode="training"), dim=1)  # of all exits; dropout is off in eval mode
        return 1 - logits.softmax(-1).amax(-1)

    return model, scores


@torch.no_grad()
def measure(run: EarlyExit, scores: Tensor, plain: Callable[[Tensor], object], images: Tensor, rounds: int) -> Any:
    """Times and answers of one project's early exit."""
    thresholds = thresholds_that_spread(scores)
    never = [-math.inf] * len(thresholds)
    one_by_one = images.split(1)
    alone = [run(image, thresholds) for image in one_by_one]
    taken, labels = (torch.cat(answers) for answers in zip(*alone, strict=True))
    in_batch = run(images, thresholds)
    runs = {
        "batch 1": lambda: [run(image, thresholds) for image in one_by_one],
        "batch 1, never taken": lambda: [run(image, never) for image in one_by_one],
        "batch 1, plain": lambda: [plain(image) for image in one_by_one],
        "one batch": lambda: run(images, thresholds),
        "one batch, plain": lambda: plain(images),
    }
    seconds = times_in_turn(runs, rounds)
    plain_of = {"batch 1": "batch 1, plain", "batch 1, never taken": "batch 1, plain", "one batch": "one batch, plain"}
    return {
        "exits": torch.bincount(taken, minlength=scores.shape[1]).tolist(),
        "relative_latency": {name: median_ratio(seconds[name], seconds[other]) for name, other in plain_of.items()},
        "right": int(((in_batch[0] == taken) & (in_batch[1] == labels)).sum()),
    }


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures both, prints the table. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(PeersArguments).parse_args_into_dataclasses(argv)
    ours = make_model("vit_base_16", arguments.num_labels)
    ours.config.exit_policy = "confidence"
    theirs, their_scores = make_earlyon(ours.config.exit_layers, arguments.num_labels)
    images, plain = noise(ours, arguments.images), ours.to_vit()
    results = {
        name: measure(run, scores, plain, images, arguments.rounds)
        for name, run, scores in (
            ("MEViT", our_early_exit(ours), ours(images).exit_scores),
            ("earlyon 0.3.0", earlyon_early_exit(theirs), their_scores(images)),
        )
    }
    rows = [
        (
            name,
            *(f"{ratio['relative_latency']:.3f}" for ratio in result["relative_latency"].values()),
            f"{result['right']} of {arguments.images}",
        )
        for name, result in results.items()
    ]
    print(markdown_table(("", "batch 1", "batch 1, never taken", f"batch {arguments.images}", "right"), rows))
    if arguments.output:
        content = {**asdict(arguments), "output": None, "results": results, "environment": environment_info()}
        Path(arguments.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
