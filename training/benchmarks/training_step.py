# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a sandwich step with all exits, relative to a step of the plain ViT.

    python training/benchmark.py [--output benchmark.json]

Time: the library's ViT with cross entropy and MEViT with 7 exits, both ViT-S/14 with random weights (which matter for
neither measure), in one process, steps in turn; the median ratio of the pairs. Memory: maximum resident set of a fresh
process each.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.reports.environment import peak_rss_mib
from modeling_mevit.trainer import MEViTTrainer, MEViTTrainingArguments


VIT_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 14}


@dataclass
class BenchmarkArguments:
    image_size: int = field(default=112, metadata={"help": "Side of the images in pixels."})
    batch_size: int = field(default=16, metadata={"help": "Images in a step."})
    num_labels: int = field(default=81, metadata={"help": "Number of classes."})
    pairs: int = field(default=30, metadata={"help": "Timed pairs of steps, after two that are not timed."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    only: str | None = field(default=None, metadata={"help": "'vit' or 'mevit': run its steps and print its memory."})


class Steps:
    """A trainer of the plain ViT or of MEViT, whose optimizer steps can be taken one by one."""

    def __init__(self, kind: str, arguments: BenchmarkArguments):
        settings = {**VIT_SMALL, "num_labels": arguments.num_labels, "image_size": arguments.image_size}
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
        shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
        self.inputs = {
            "pixel_values": torch.randn(shape, generator=generator),
            "labels": torch.randint(arguments.num_labels, (arguments.batch_size,), generator=generator),
        }

    def take(self) -> float:
        """One step, forward to update. Returns its seconds."""
        start = time.perf_counter()
        self.trainer.compute_loss(self.trainer.model, self.inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trainer.state.global_step += 1
        return time.perf_counter() - start


def peak_memory(kind: str, arguments: BenchmarkArguments) -> float:
    """Maximum resident set in MiB of a fresh process that takes five steps."""
    options = [f"--{name}={value}" for name, value in asdict(arguments).items() if value is not None]
    command = [sys.executable, str(Path(__file__).resolve()), *options, f"--only={kind}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main(argv: list[str] | None = None) -> dict:
    """Measures and prints both ratios. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    if arguments.only:
        steps = Steps(arguments.only, arguments)
        for _ in range(5):
            steps.take()
        print(peak())
        return {}

    memory = {kind: peak_memory(kind, arguments) for kind in ("vit", "mevit")}
    plain, sandwich = Steps("vit", arguments), Steps("mevit", arguments)
    pairs = [(plain.take(), sandwich.take()) for _ in range(arguments.pairs + 2)][2:]
    ratios = sorted(ours / theirs for theirs, ours in pairs)
    quartile = len(ratios) // 4
    results = {
        "time_ratio": median(ratios),
        "time_ratio_quartiles": [ratios[quartile], ratios[-1 - quartile]],
        "plain_step_seconds": median(theirs for theirs, _ in pairs),
        "memory_ratio": memory["mevit"] / memory["vit"],
        "plain_peak_mib": memory["vit"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: value for name, value in asdict(arguments).items() if name not in ("output", "only")},
    }
    print(json.dumps(results, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
