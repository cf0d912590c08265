# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Size, latency and memory of exported files beside the plain ViT's, with random weights, which matter for none.

    python training/benchmark_export.py [--model vit_base_16] [--image_size 448] [--output benchmark_export.json]

`mevit benchmark` on images of noise, twice: with a cascade that nobody leaves, and with one that everyone leaves at
the earliest exit.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.data import image_processor_for
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.onnx.benchmark import benchmark, table_of
from modeling_mevit.onnx.export import export
from training.benchmark_early_exit import MODELS, make_model


CASCADES = {"nobody leaves early": 0.0, "all leave at the earliest exit": 1.0}  # thresholds of 1 − confidence


@dataclass
class BenchmarkArguments:
    model: str = field(default="vit_base_16", metadata={"help": "'vit_base_16' or 'vit_small_14'."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images; the model's by default."})
    num_labels: int = field(default=200, metadata={"help": "Number of classes."})
    images: int = field(default=30, metadata={"help": "Images at batch 1, after five that are not timed."})
    threads: int = field(default=0, metadata={"help": "Of one operator; the libraries' choice by default."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model={self.model!r} is unknown; allowed are {list(MODELS)}.")


def leave_under(directory: Path, threshold: float) -> None:
    """Gives a checkpoint or an export one threshold for all exits."""
    for name, field_name in (("config.json", "exit_thresholds"), ("cascade.json", "thresholds")):
        file = directory / name
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings[field_name] = [threshold] * len(settings[field_name])
            file.write_text(json.dumps(settings), encoding="utf-8")


def measure(model: MEViTForImageClassification, arguments: BenchmarkArguments) -> dict[str, list[dict[str, Any]]]:
    """What a cascade does → the rows of [`benchmark`]."""
    config: MEViTConfig = model.config
    config.exit_policy, config.early_exit = "confidence", True
    config.exit_thresholds = [0.0] * (len(config.exit_layers) - 1)
    side = config.image_size
    processor = image_processor_for(side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, 3, side, side), dtype=np.float32) for _ in range(arguments.images)]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, exported = Path(directory) / "checkpoint", Path(directory) / "exported"
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        export(model, processor, exported, exits=[config.exit_layers[0], config.exit_layers[-1]], cascade=True)
        for name, threshold in CASCADES.items():
            leave_under(checkpoint, threshold)
            leave_under(exported, threshold)
            results[name] = benchmark(str(checkpoint), exported, images, threads=arguments.threads)
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints both tables. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    model = make_model(arguments.model, arguments.num_labels, arguments.image_size)
    rows = measure(model, arguments)
    for name, of_cascade in rows.items():
        print(f"\n{name}:\n\n{table_of(of_cascade)}", flush=True)
    settings = {name: value for name, value in asdict(arguments).items() if name != "output"}
    results = {**settings, "image_size": model.config.image_size, "machine": machine(), "rows": rows}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
