# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Export of a trained model: a file for each exit, and the cascade, each compared with PyTorch before it counts."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx import export_models, validate_model_outputs
from PIL import Image
from transformers import BaseImageProcessor

from ..calibration import Certificate
from ..cost import dynamic_exit_costs
from ..data import height_and_width
from ..modeling_mevit import MEViTForImageClassification
from . import cascade_mevit
from .graphs import ExitGraph, Graph, QueryGraph, StageGraph, file_of_exit
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
        recalibrated: what choosing the thresholds anew gave in a lower precision, None where it was not done.
    """

    directory: Path
    files: dict[str, int]
    recalibrated: Certificate | None = None


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
    1e-4; where one did not, it is renamed to `output.failed`. An export that is interrupted is removed; what is left
    of one that was killed has no config, so that it does not load.

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
        ValueError: where the model has not what is asked for, the runtime cannot prepare images as the image
            processor does, or `output` holds something.
        ExportError: where a file's outputs differ from PyTorch's.
    """
    output = Path(output).resolve()
    config = model.config
    exits = list(config.exit_layers) if exits is None else sorted(set(exits))
    unknown = [layer for layer in exits if layer not in config.exit_layers]
    if unknown or not exits:
        raise ValueError(f"exits={exits} are not all exits of this model; it has {config.exit_layers}.")
    if opset not in OPSETS:
        raise ValueError(f"opset={opset} cannot be exported; allowed are {OPSETS.start} to {OPSETS.stop - 1}.")
    if cascade:
        preprocessing_of(image_processor, height_and_width(config.image_size))  # says what it cannot do
        if len(config.exit_layers) < 2:
            raise ValueError(f"the model has one exit only, {config.exit_layers}; a cascade needs an early one.")
    if cascade and early_exit:
        config.resolve_exit_thresholds()  # says that it has none
        if quantization and config.exit_policy != "patience" and config.calibration is None:
            raise ValueError(
                "the thresholds were set by hand, and scores move in a lower precision; "
                "calibrate the model first, or export without early exit."
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty.")

    model = model.float().cpu().eval()
    graphs: dict[str, Graph] = {file_of_exit(layer, config.exit_layers): ExitGraph(model, layer) for layer in exits}
    if cascade:
        for layer in config.exit_layers:
            graphs[f"stage_{layer}.onnx"] = StageGraph(model, layer)
            graphs[f"rows_{layer}.onnx"] = QueryGraph(model, layer)

    def write(directory: Path) -> Certificate | None:
        written, recalibrated = copy.deepcopy(config), None
        _export_and_compare(graphs, directory, opset)
        if cascade:
            description = cascade_description(model, image_processor, early_exit)
            (directory / "cascade.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            shutil.copy(cascade_mevit.__file__, directory)
            runtime = cascade_mevit.Cascade(directory)
            compare_cascade(model, runtime)
            compare_preprocessing(image_processor, runtime)
        if quantization:
            recalibrated = quantization.apply(directory, written)
        image_processor.save_pretrained(directory)
        written.save_pretrained(directory)
        return recalibrated

    recalibrated = write_whole(output, write)
    return Export(output, {name: (output / name).stat().st_size for name in graphs}, recalibrated)


def write_whole(output: Path, write: Callable[[Path], Any]) -> Any:
    """Calls `write` with `output.partial` and renames it to `output` at its end; returns what it returned.

    After an [`ExportError`] it is renamed to `output.failed`, after anything else that stops `write` removed.
    """
    partial, failed = (output.with_name(f"{output.name}.{state}") for state in ("partial", "failed"))
    for left_over in (partial, failed):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        result = write(partial)
    except ExportError as error:
        partial.rename(failed)
        raise ExportError(f"{error} What was written is in {failed}.") from error
    except BaseException:
        shutil.rmtree(partial)
        raise
    if output.exists():
        output.rmdir()  # empty, or this fails
    partial.rename(output)
    return result


def cascade_description(
    model: MEViTForImageClassification, image_processor: BaseImageProcessor, early_exit: bool
) -> dict[str, Any]:
    """What `cascade.json` holds: all that the runtime has to know."""
    config = model.config
    costs = dynamic_exit_costs(config)
    height, width = height_and_width(config.image_size)
    has_thresholds = config.exit_thresholds is not None and config.exit_policy != "patience"
    return {
        "stages": [
            {
                "exit_layer": layer,
                "stage": f"stage_{layer}.onnx",
                "rows": f"rows_{layer}.onnx",
                "cost": costs[layer],
                **{
                    f"{direction}_of_{kind}": list(getattr(graph, f"axes_of_{direction}"))
                    for kind, graph in (("stage", StageGraph(model, layer)), ("rows", QueryGraph(model, layer)))
                    for direction in ("inputs", "outputs")
                },
            }
            for layer in config.exit_layers
        ],
        "policy": config.exit_policy,
        "thresholds": config.resolve_exit_thresholds() if has_thresholds else None,
        "patience": config.patience,
        "early_exit": early_exit,
        "calibration": config.calibration,
        "labels": [config.id2label[label] for label in range(config.num_labels)],
        "channels": config.num_channels,
        "image_size": [height, width],
        "preprocessing": preprocessing_of(image_processor, (height, width)),
    }


def preprocessing_of(image_processor: BaseImageProcessor, size: tuple[int, int]) -> dict[str, Any]:
    """What the runtime does to an image: `resize` and `crop` (height and width, or None), then the values.

    Raises:
        ValueError: where the image processor does something else, or its images are not of the model's `size`.
    """

    def sides(name: str) -> list[int]:
        given = dict(getattr(image_processor, name))
        if set(given) != {"height", "width"}:
            raise ValueError(
                f"the image processor's {name}={given} cannot be exported with a cascade; it needs height and width."
            )
        return [given["height"], given["width"]]

    resize = sides("size") if image_processor.do_resize else None
    crop = sides("crop_size") if getattr(image_processor, "do_center_crop", False) else None
    if (crop or resize) != list(size):
        raise ValueError(f"the image processor makes images of {crop or resize}; the model needs {list(size)}.")
    channels = 3
    normalizes = image_processor.do_normalize
    return {
        "resize": resize,
        "resample": int(image_processor.resample),
        "crop": crop,
        "rescale": image_processor.rescale_factor if image_processor.do_rescale else 1.0,
        "mean": list(image_processor.image_mean) if normalizes else [0.0] * channels,
        "std": list(image_processor.image_std) if normalizes else [1.0] * channels,
    }


def compare_preprocessing(image_processor: BaseImageProcessor, cascade: cascade_mevit.Cascade) -> None:
    """Has the runtime of an export and the image processor read an image of noise.

    Raises:
        ExportError: where they differ by more than half a grey level on average.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image_processor(image, return_tensors="np")["pixel_values"])
    settings = cascade.config["preprocessing"]
    grey_level = settings["rescale"] / min(settings["std"])
    difference = np.abs(cascade.preprocess([image]) - expected).mean()
    if not difference <= grey_level / 2:
        raise ExportError(
            f"the runtime prepares images otherwise than the image processor: they differ by "
            f"{difference / grey_level:.1f} grey levels on average."
        )


@torch.no_grad()
def compare_cascade(
    model: MEViTForImageClassification, cascade: cascade_mevit.Cascade, tolerance: float = TOLERANCE
) -> None:
    """Compares an exported cascade with PyTorch on noise: the logits of every exit, and where images leave.

    They leave under thresholds in the midst of their scores, so that some go on at every exit.

    Raises:
        ExportError: where logits differ by more than `tolerance`, or an image leaves elsewhere, unless one of its
            scores is borderline.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    # not the batch size that the graphs were traced with
    pixel_values = torch.randn(8, config.num_channels, *height_and_width(config.image_size), generator=generator)
    outputs = model(pixel_values, early_exit=False)
    expected = outputs.exit_logits.numpy()  # (B, E, L)
    logits, _ = cascade.every_exit(pixel_values.numpy())
    differences = np.abs(logits - expected).max((0, 2))
    for layer, difference in zip(model.config.exit_layers, differences, strict=True):
        if not difference <= tolerance:
            raise ExportError(
                f"the cascade's logits of exit {layer} differ from PyTorch's by {difference:.2e}; "
                f"allowed is {tolerance}."
            )
    thresholds, borderline = None, np.zeros(len(pixel_values), dtype=bool)
    if config.exit_policy != "patience":
        scores = outputs.exit_scores[:, :-1].double().numpy()
        thresholds = np.median(scores, axis=0).tolist()
        borderline = (np.abs(scores - thresholds) < cascade_mevit.BORDERLINE).any(1)
    elsewhere = (
        cascade(pixel_values.numpy(), early_exit=True, exit_thresholds=thresholds)[1]
        != model(pixel_values, early_exit=True, exit_thresholds=thresholds).exit_layer.numpy()
    ) & ~borderline
    if elsewhere.any():
        raise ExportError(f"{elsewhere.sum()} of {len(elsewhere)} images leave the cascade at another exit.")


def _export_and_compare(graphs: dict[str, Graph], directory: Path, opset: int) -> None:
    """Exports all graphs with Optimum, and compares each file's outputs with the graph's on the same input."""
    pairs = {name: (graph.eval(), graph.onnx_config()) for name, graph in graphs.items()}
    _, output_names = export_models(pairs, directory, opset=opset, output_names=list(pairs))
    for (name, (graph, onnx_config)), outputs in zip(pairs.items(), output_names, strict=True):
        try:
            validate_model_outputs(onnx_config, graph, directory / name, outputs, atol=TOLERANCE, use_subprocess=False)
        except Exception as error:  # Optimum has a class for each kind of difference
            raise ExportError(f"{name} differs from PyTorch: {' '.join(str(error).split())}") from error
