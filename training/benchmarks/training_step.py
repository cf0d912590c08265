# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a sandwich step with all exits, relative to a step of the plain ViT.

    python training/benchmarks/training_step.py [--output training_step.json]

Time: the ViT of Transformers with cross entropy and MEViT with 7 exits, both ViT-S/14 with random weights (which
matter for neither measure), in one process, steps in turn; the median ratio of the pairs. Memory: maximum resident set
of a fresh process each.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from modeling_mevit import MEViTConfig, MEViTForImageClassification, MEViTTrainer, MEViTTrainingArguments
from modeling_mevit.reports.environment import peak_rss_mib
from timing import MODELS, median_ratio, peak_memory, times_in_turn


@dataclass
class TrainingStepBenchmarkArguments:
    """What is measured."""

    image_size: int = field(default=112, metadata={"help": "Side of the images in pixels."})
    batch_size: int = field(default=16, metadata={"help": "Images in a step."})
    num_labels: int = field(default=81, metadata={"help": "Number of classes."})
    pairs: int = field(default=30, metadata={"help": "Timed pairs of steps, after two that are not timed."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    only: str | None = field(default=None, metadata={"help": "'vit' or 'mevit': run its steps and print its memory."})


class Steps:
    """A trainer of the plain ViT or of MEViT, whose optimizer steps can be taken one by one."""

    def __init__(self, kind: str, arguments: TrainingStepBenchmarkArguments):
        size, num_labels = arguments.image_size, arguments.num_labels
        settings = {**MODELS["vit_small_14"], "num_labels": num_labels, "image_size": size}
        with tempfile.TemporaryDirectory() as directory:
            options = {"output_dir": directory, "report_to": "none", "use_cpu": True, "max_steps": 1}
            if kind == "vit":
                model = ViTForImageClassification(ViTConfig(**settings))
                self.trainer = Trainer(model=model.train(), args=TrainingArguments(**options))
            else:
                model = MEViTForImageClassification(MEViTConfig(**settings))
                self.trainer = MEViTTrainer(model=model.train(), args=MEViTTrainingArguments(**options))
        self.optimizer = self.trainer.create_optimizer()
        generator = torch.Generator().manual_seed(0)
        self.inputs = {
            "pixel_values": torch.randn((arguments.batch_size, 3, size, size), generator=generator),
            "labels": torch.randint(num_labels, (arguments.batch_size,), generator=generator),
        }

    def take(self) -> None:
        """Takes one step, from forward to update."""
        self.trainer.compute_loss(self.trainer.model, self.inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trainer.state.global_step += 1


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints both ratios. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(TrainingStepBenchmarkArguments).parse_args_into_dataclasses(argv)
    if arguments.only:
        steps = Steps(arguments.only, arguments)
        for _ in range(5):
            steps.take()
        print(peak_rss_mib())
        return {}

    settings = {name: value for name, value in asdict(arguments).items() if name not in ("output", "only")}
    options = [f"--{name}={value}" for name, value in settings.items()]
    memory = {kind: peak_memory(__file__, *options, f"--only={kind}") for kind in ("vit", "mevit")}
    seconds = times_in_turn({kind: Steps(kind, arguments).take for kind in ("vit", "mevit")}, arguments.pairs)
    ratio = median_ratio(seconds["mevit"], seconds["vit"])
    results = {
        "relative_step_time": ratio["relative_latency"],
        "quartiles": ratio["quartiles"],
        "plain_step_seconds": median(seconds["vit"]),
        "relative_memory": memory["mevit"] / memory["vit"],
        "plain_peak_mib": memory["vit"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **settings,
    }
    print(json.dumps(results, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
