# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Export of a trained model: a file for each exit, and the cascade, each compared with PyTorch before it counts."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx import export_models, validate_model_outputs
from transformers import BaseImageProcessor

from ..cost import early_exit_costs
from ..modeling_mevit import MEViTForImageClassification
from . import cascade_mevit
from .graphs import ExitGraph, Graph, RowsGraph, StageGraph, file_of_exit
from .quantize import Quantization


TOLERANCE = 1e-4  # of float32 outputs, absolute
OPSETS = range(17, 24)
DEFAULT_OPSET = 18


class ExportError(ValueError):
    """An exported file does not do what the model does."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        directory: of the files.
        files: name → size in bytes, of every graph.
    """

    directory: Path
    files: dict[str, int]


def export(
    model: MEViTForImageClassification,
    image_processor: BaseImageProcessor,
    output: str | Path,
    *,
    exits: list[int] | None = None,
    cascade: bool = False,
    early_exit: bool = True,
    opset: int = DEFAULT_OPSET,
    quantization: Quantization | None = None,
) -> Export:
    """Writes `exit_k.onnx` for each exit asked for, the last one as `model.onnx`, and the cascade.

    Everything is written to `output.partial` and renamed when every file gave the same outputs as PyTorch, within
    1e-4; where one did not, it is renamed to `output.failed`.

    Args:
        model: in float32.
        image_processor: of the model.
        output: directory that does not exist yet, or is empty.
        exits: exit layers to export a file for; all by default.
        cascade: whether to export the chain of stages too.
        early_exit: whether the cascade leaves early unless told otherwise, by the thresholds of the model's config.
        opset: of ONNX.
        quantization: what to lower the precision with, once the float32 files are right.

    Raises:
        ValueError: where the model has not what is asked for, or `output` holds something.
        ExportError: where a file's outputs differ from PyTorch's.
    """
    output = Path(output)
    config = model.config
    exits = list(config.exit_layers) if exits is None else sorted(set(exits))
    unknown = [layer for layer in exits if layer not in config.exit_layers]
    if unknown or not exits:
        raise ValueError(f"exits={exits} are not all exits of this model; it has {config.exit_layers}.")
    if opset not in OPSETS:
        raise ValueError(f"opset={opset} cannot be exported; allowed are {OPSETS.start} to {OPSETS.stop - 1}.")
    if cascade and early_exit:
        config.thresholds_of_early_exits()  # says that it has none
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty.")

    model = model.float().cpu().eval()
    graphs: dict[str, Graph] = {file_of_exit(layer, config.exit_layers): ExitGraph(model, layer) for layer in exits}
    if cascade:
        for layer in config.exit_layers:
            graphs[f"stage_{layer}.onnx"] = StageGraph(model, layer)
            graphs[f"rows_{layer}.onnx"] = RowsGraph(model, layer)

    def write(directory: Path) -> None:
        config.save_pretrained(directory)
        image_processor.save_pretrained(directory)
        _export_and_compare(graphs, directory, opset)
        if cascade:
            description = cascade_description(model, image_processor, early_exit)
            (directory / "cascade.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            shutil.copy(cascade_mevit.__file__, directory)
            compare_cascade(model, directory)
        if quantization:
            quantization.apply(directory)

    write_whole(output, write)
    return Export(output, {name: (output / name).stat().st_size for name in graphs})


def write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with `output.partial` and renames it to `output` at its end, or to `output.failed`."""
    partial, failed = (output.with_name(f"{output.name}.{state}") for state in ("partial", "failed"))
    for left_over in (partial, failed):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except ExportError as error:
        partial.rename(failed)
        raise ExportError(f"{error} What was written is in {failed}.") from error
    if output.exists():
        output.rmdir()  # empty, or this fails
    partial.rename(output)


def cascade_description(
    model: MEViTForImageClassification, image_processor: BaseImageProcessor, early_exit: bool
) -> dict[str, Any]:
    """What `cascade.json` holds: all that the runtime has to know."""
    config = model.config
    costs = early_exit_costs(config)
    size = config.image_size
    has_thresholds = config.exit_thresholds is not None and config.exit_policy != "patience"
    return {
        "stages": [
            {
                "exit_layer": layer,
                "stage": f"stage_{layer}.onnx",
                "rows": f"rows_{layer}.onnx",
                "cost": costs[layer],
            }
            for layer in config.exit_layers
        ],
        "policy": config.exit_policy,
        "thresholds": config.thresholds_of_early_exits() if has_thresholds else None,
        "patience": config.patience,
        "early_exit": early_exit,
        "calibration": config.calibration,
        "labels": [config.id2label[label] for label in range(config.num_labels)],
        "channels": config.num_channels,
        "image_size": [size, size] if isinstance(size, int) else list(size),
        "preprocessing": {
            "resize": [image_processor.size["height"], image_processor.size["width"]],
            "resample": int(image_processor.resample),
            "crop": [image_processor.crop_size["height"], image_processor.crop_size["width"]],
            "rescale": image_processor.rescale_factor,
            "mean": list(image_processor.image_mean),
            "std": list(image_processor.image_std),
        },
    }


@torch.no_grad()
def compare_cascade(model: MEViTForImageClassification, directory: Path, tolerance: float = TOLERANCE) -> None:
    """Runs an exported cascade to its end, on noise, and compares the logits of every exit with PyTorch's.

    Raises:
        ExportError: where they differ by more than `tolerance`.
    """
    pixel_values = ExitGraph(model, model.config.exit_layers[-1]).dummy_inputs()["pixel_values"]
    expected = model(pixel_values, early_exit=False).exit_logits.numpy()  # (B, E, L)
    logits, _ = cascade_mevit.Cascade(directory).every_exit(pixel_values.numpy())
    differences = np.abs(logits - expected).max((0, 2))
    for layer, difference in zip(model.config.exit_layers, differences, strict=True):
        if not difference <= tolerance:
            raise ExportError(
                f"the cascade's logits of exit {layer} differ from PyTorch's by {difference:.2e}; "
                f"allowed is {tolerance}."
            )


def _export_and_compare(graphs: dict[str, Graph], directory: Path, opset: int) -> None:
    """Exports all graphs with Optimum, and compares each file's outputs with the graph's on the same input."""
    pairs = {name: (graph.eval(), graph.onnx_config()) for name, graph in graphs.items()}
    _, output_names = export_models(pairs, directory, opset=opset, output_names=list(pairs))
    for (name, (graph, onnx_config)), outputs in zip(pairs.items(), output_names, strict=True):
        try:
            validate_model_outputs(onnx_config, graph, directory / name, outputs, atol=TOLERANCE, use_subprocess=False)
        except Exception as error:  # Optimum has a class for each kind of difference
            raise ExportError(f"{name} differs from PyTorch: {' '.join(str(error).split())}") from error
