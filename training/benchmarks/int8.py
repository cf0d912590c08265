# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What int8 costs at every exit, by how it is made: ranges, what is rounded, and which layers stay in float32.

    python training/benchmarks/int8.py --export EXPORT --data PATH [--output int8.json]

EXPORT is a cascade in float32. Its graphs are converted by ONNX Runtime in each of the ways, and run over the images:
accuracy of every exit, and how many images get the label that they get in float32.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationMethod, quantize_static
from torch.utils.data import Dataset
from transformers import HfArgumentParser

from modeling_mevit import DataSource, MEViTConfig
from modeling_mevit.checkpoint import load_image_processor
from modeling_mevit.early_exit.predictions import batches
from modeling_mevit.exit_policy_mevit import combine_exits
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.onnx.graphs import GraphFile, cascade_files
from modeling_mevit.onnx.quantize import (
    QUANTIZED,
    TARGETS,
    Feeds,
    host_target,
    static_int8_arguments,
    training_feeds,
)
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.reports.tables import markdown_table


HISTOGRAM_IMAGES = 32  # histograms hold all activations of all images

# what differs from `static_int8_arguments`
WAYS: dict[str, dict[str, Any]] = {
    "as exported": {},
    "products in 8 bits too": {"extra_options": {}},
    "one range for all channels of a weight": {"per_channel": False},
    "percentile 99.999": {"calibrate_method": CalibrationMethod.Percentile, "CalibPercentile": 99.999},
    "entropy": {"calibrate_method": CalibrationMethod.Entropy},
    "first and last layer in float32": {"layers_in_float": ("first", "last")},
}


@dataclass
class Int8Arguments:
    """What is measured."""

    export: str = field(metadata={"help": "Directory of a cascade in float32."})
    data: str = field(metadata={"help": "The data set that the model was trained on."})
    split: str = field(default="validation", metadata={"help": "Its images to measure on."})
    target: str | None = field(default=None, metadata={"help": "Processor; this machine's by default."})
    ways: list[str] = field(default_factory=lambda: list(WAYS), metadata={"help": "Some of the ways, by name."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        unknown = sorted(set(self.ways) - set(WAYS))
        if unknown:
            raise ValueError(f"ways must be some of {list(WAYS)}, got {unknown}")


@torch.no_grad()
def labels_of_exits(directory: Path, config: MEViTConfig, dataset: Dataset) -> np.ndarray:
    """(N, E), what every exit predicts."""
    cascade = Cascade(directory)
    predicted = []
    for batch in batches(dataset, 32, 0, directory.name):
        logits = torch.from_numpy(cascade.every_exit(batch["pixel_values"].numpy())[0])
        predicted.append(combine_exits(config.exit_combination, logits).argmax(-1).numpy())
    return np.concatenate(predicted)


def convert(
    exported: Path, directory: Path, config: MEViTConfig, training: Dataset, target: str, way: dict[str, Any]
) -> None:
    """Writes an export's cascade in int8 to a directory, in one of the ways."""
    files = [file for layer in config.exit_layers for file in cascade_files(layer)]
    way = dict(way)
    layers_in_float, percentile = way.pop("layers_in_float", ()), way.pop("CalibPercentile", None)
    for file, (name, feeds) in zip(files, training_feeds(exported, files, config, training), strict=True):
        arguments = {**static_int8_arguments(exported / name, TARGETS[target]), **way}
        if percentile is not None:
            arguments["extra_options"] = {**arguments["extra_options"], "CalibPercentile": percentile}
        arguments["nodes_to_exclude"] += nodes_of_layers(onnx.load(exported / name), file, config, layers_in_float)
        if "calibrate_method" in way:
            feeds = feeds[:HISTOGRAM_IMAGES]
        quantize_static(exported / name, directory / name, Feeds(feeds), **arguments)


def nodes_of_layers(
    model: onnx.ModelProto, file: GraphFile, config: MEViTConfig, layers: tuple[str, ...]
) -> list[str]:
    """Products in a graph of the first and the last encoder layer, as far as they are asked for.

    Nodes lie in the order of the layers. The first layer has its six products with weights in the first stage, but for
    four that are in the query graph where it has an exit; the last one is the last exit's.
    """
    weights = {weight.name for weight in model.graph.initializer}
    products = [
        node.name for node in model.graph.node if node.op_type in QUANTIZED and weights.intersection(node.input)
    ]
    is_last = file.exit_layer == config.num_hidden_layers
    chosen = []
    if "first" in layers and file.exit_layer == config.exit_layers[0]:
        if file.kind == "stage":
            chosen += products[:6] if file.exit_layer > 1 else products
        elif file.exit_layer == 1:
            chosen += products
    if "last" in layers and is_last:
        chosen += products[-2:] if file.kind == "stage" else products  # keys and values; the rest
    return chosen


def measure(arguments: Int8Arguments) -> dict[str, Any]:
    """Accuracy of every exit in float32, and accuracy and agreement in each of the ways."""
    exported = Path(arguments.export)
    config, processor = MEViTConfig.from_pretrained(exported), load_image_processor(exported)
    dataset, training = (
        DataSource(arguments.data, split).load(config.label2id, processor) for split in (arguments.split, "train")
    )
    target = arguments.target or host_target()
    labels = np.array([dataset[index]["labels"] for index in range(len(dataset))])[:, None]
    expected = labels_of_exits(exported, config, dataset)
    rows = {"float32": {"accuracy": (expected == labels).mean(0).tolist(), "agreement": [1.0] * expected.shape[1]}}
    for name in arguments.ways:
        with tempfile.TemporaryDirectory() as temporary:
            directory = shutil.copytree(exported, Path(temporary) / "int8")
            convert(exported, directory, config, training, target, WAYS[name])
            predicted = labels_of_exits(directory, config, dataset)
        rows[name] = {
            "accuracy": (predicted == labels).mean(0).tolist(),
            "agreement": (predicted == expected).mean(0).tolist(),
        }
        print(f"{name}: largest drop {max(drops(rows, name)):.2%}", flush=True)
    return {
        "data": {"name": Path(arguments.data).name, "split": arguments.split, "num_samples": len(dataset)},
        "target": target,
        "exit_layers": config.exit_layers,
        "rows": rows,
        "environment": environment_info(),
    }


def drops(rows: dict[str, dict[str, list[float]]], name: str) -> list[float]:
    """Accuracy that each exit loses in one of the ways."""
    return [before - after for before, after in zip(rows["float32"]["accuracy"], rows[name]["accuracy"], strict=True)]


def table(results: dict[str, Any]) -> str:
    """Drop in points of every exit, and agreement with float32, mean over the exits."""
    rows = results["rows"]
    header = ("int8", *(f"exit {layer}" for layer in results["exit_layers"]), "same label as in float32")
    lines = (
        (name, *(f"{100 * drop:.1f}" for drop in drops(rows, name)), f"{np.mean(rows[name]['agreement']):.1%}")
        for name in rows
        if name != "float32"
    )
    return markdown_table(header, lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints the table. Returns what the JSON holds."""
    parser = HfArgumentParser(Int8Arguments)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    results = measure(arguments)
    print(table(results))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
