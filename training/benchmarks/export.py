# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Size, latency and memory of exported files beside the plain ViT's, with random weights, which matter for none.

    python training/benchmarks/export.py [--model vit_base_16] [--image_size 448] [--output export.json]

`mevit benchmark` on images of noise, twice: with a cascade that nobody leaves, and with one that everyone leaves at
the earliest exit. And `export_memory`: the most memory that writing the cascade takes in a fresh process, the model
included and imported libraries left out, relative to the model's weights.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from modeling_mevit import MEViTConfig, MEViTForImageClassification, export
from modeling_mevit.data.image_processing import image_processor_for
from modeling_mevit.onnx.benchmark import BenchmarkRow, benchmark
from modeling_mevit.reports.environment import environment_info, peak_rss_mib, rss_mib
from modeling_mevit.reports.tables import benchmark_table
from timing import MODELS, make_model, peak_memory


CASCADES = {"nobody leaves early": 0.0, "all leave at the earliest exit": 1.0}  # thresholds of 1 − confidence


@dataclass
class ExportBenchmarkArguments:
    """What is measured."""

    model: str = field(default="vit_base_16", metadata={"help": "'vit_base_16' or 'vit_small_14'."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images; the model's by default."})
    num_labels: int = field(default=200, metadata={"help": "Number of classes."})
    images: int = field(default=30, metadata={"help": "Images at batch 1, after five that are not timed."})
    threads: int = field(default=0, metadata={"help": "Of one operator; the libraries' choice by default."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    only_export: bool = field(default=False, metadata={"help": "Export once, and print the memory that it takes."})

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {list(MODELS)}, got {self.model!r}")


def set_threshold(directory: Path, threshold: float) -> None:
    """Gives a checkpoint or an export one threshold for all exits."""
    file = directory / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["exit_thresholds"] = [threshold] * len(settings["exit_thresholds"])
    file.write_text(json.dumps(settings), encoding="utf-8")


def export_cascade(model: MEViTForImageClassification, directory: Path) -> Any:
    """Exports a cascade that nobody leaves, and the file of the earliest exit. Returns the image processor."""
    config = model.config
    config.exit_policy, config.early_exit = "confidence", True
    config.exit_thresholds = [0.0] * (len(config.exit_layers) - 1)
    processor = image_processor_for(config.image_size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    export(model, processor, directory, exits=config.exit_layers[:1], cascade=True)
    return processor


def memory_of_export(arguments: ExportBenchmarkArguments) -> float:
    """The most memory in MiB that making and exporting a model takes in this process, beyond what it held before."""
    small = MEViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8
    )
    with tempfile.TemporaryDirectory() as directory:
        # imports whatever exporting imports
        export_cascade(MEViTForImageClassification(small).eval(), Path(directory, "small"))
        before = rss_mib()
        export_cascade(make_model(arguments.model, arguments.num_labels, arguments.image_size), Path(directory, "out"))
    return peak_rss_mib() - before


def measure(model: MEViTForImageClassification, arguments: ExportBenchmarkArguments) -> dict[str, list[BenchmarkRow]]:
    """What a cascade does → the rows of [`benchmark`]."""
    config = model.config
    side = config.image_size
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, 3, side, side), dtype=np.float32) for _ in range(arguments.images)]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, exported = Path(directory) / "checkpoint", Path(directory) / "exported"
        processor = export_cascade(model, exported)
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        for name, threshold in CASCADES.items():
            set_threshold(checkpoint, threshold)
            set_threshold(exported, threshold)
            results[name] = benchmark(str(checkpoint), exported, images, threads=arguments.threads)
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints both tables. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(ExportBenchmarkArguments).parse_args_into_dataclasses(argv)
    if arguments.only_export:
        print(memory_of_export(arguments))
        return {}
    model = make_model(arguments.model, arguments.num_labels, arguments.image_size)
    rows = {name: [row.to_dict() for row in measured] for name, measured in measure(model, arguments).items()}
    for name, measured in rows.items():
        print(f"\n{name}:\n\n{benchmark_table(measured)}", flush=True)
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("output", "only_export")}
    settings["num_samples"] = settings.pop("images")
    settings["image_size"] = model.config.image_size
    options = [f"--{name}={settings[name]}" for name in ("model", "num_labels", "image_size")]
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    memory = peak_memory(__file__, *options, "--only_export=True") / weights
    print(f"\nexport: at most {memory:.2f} of the weights' memory", flush=True)
    results = {**settings, "environment": environment_info(), "export_memory": memory, "rows": rows}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
