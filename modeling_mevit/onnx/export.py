# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Export of a trained model: a file for each exit, and the cascade, each compared with PyTorch before it counts."""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx import export_models, validate_model_outputs
from PIL import Image
from transformers import BaseImageProcessor

from ..configuration_mevit import MEViTConfig
from ..early_exit.calibration import check_sample_size
from ..early_exit.calibration_target import CalibrationTarget
from ..exit_policy_mevit import combine_exits
from ..modeling_mevit import MEViTForImageClassification
from ..vit_backbone_mevit import to_2tuple
from . import cascade_mevit
from .graphs import GraphFile, build_graph, cascade_files, cascade_stages, exit_file
from .page import WebPage, keep_float32
from .quantize import PrecisionReport, Quantization, lower_precision


TOLERANCE = 1e-4  # of float32 outputs, absolute
OPSET = 18


class ExportError(ValueError):
    """An exported file does not do what the model does."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        directory: of the files.
        files: name → size in bytes, of every graph.
        report: what lowering the precision did; None for float32.
    """

    directory: Path
    files: dict[str, int]
    report: PrecisionReport | None = None

    @property
    def lost_early_exit(self) -> bool:
        """Whether the thresholds could not be chosen anew in a lower precision, so that early exit is off."""
        calibration = self.report.calibration if self.report else None
        return calibration is not None and calibration.operating_point is None

    def __str__(self) -> str:
        """Files and sizes; with a lower precision, what it costs in accuracy and which thresholds it has now."""
        lines = [f"{size / 1e6:9.2f} MB  {name}" for name, size in self.files.items()]
        if self.report:
            precision = self.report.precision
            made_for = f", made for {self.report.target}" if self.report.target else ""
            lines += [
                f"{name}: accuracy {before:.1%} in float32, {after:.1%} in {precision}{made_for}"
                for name, (before, after) in self.report.accuracy.items()
            ]
        lines.append(f"Everything is in {self.directory}; each float32 file gave what PyTorch gives.")
        if self.report and self.report.calibration:
            lines.append(str(self.report.calibration))
        if self.lost_early_exit:
            lines.append(f"Early exit is off in {self.directory}.")
        return "\n".join(lines)


def export(
    model: MEViTForImageClassification,
    image_processor: BaseImageProcessor,
    output: str | Path,
    *,
    exits: list[int] | None = None,
    cascade: bool = False,
    early_exit: bool = True,
    quantization: Quantization | None = None,
    page: WebPage | None = None,
) -> Export:
    """Writes `exit_k.onnx` for each exit asked for, the last one as `model.onnx`, and the cascade.

    Everything is written to a new directory beside `output` and renamed when every file gave the same outputs as
    PyTorch, within 1e-4; where one did not, it is kept as `output.failed-…`, which the error names. An export that is
    interrupted is removed; what is left of one that was killed, `.output-…`, has neither config.json nor cascade.json,
    so that it does not load.

    Args:
        model: it is brought to the CPU, to float32 and into eval mode, and stays there.
        image_processor: of the model.
        output: directory that does not exist yet, or is empty.
        exits: exit layers to export a file for; all by default.
        cascade: whether to export the chain of stages too.
        early_exit: whether the cascade leaves early unless told otherwise, by the thresholds of the model's config.
        quantization: what to lower the precision with, once the float32 files are right.
        page: to add to the cascade, to run it in a browser. With a lower precision it offers float32 too, whose files
            are kept in a folder of that name.

    Raises:
        ValueError: where the model lacks what is asked for, the runtime cannot prepare images as the image processor
            does, too few images are given to certify the thresholds anew, or `output` is not empty.
        ExportError: where a file's outputs differ from PyTorch's.
    """
    output = Path(output).resolve()
    if page and not cascade:
        raise ValueError("a page runs the cascade; export that too.")
    config = copy.deepcopy(model.config)
    exits = list(config.exit_layers) if exits is None else sorted(set(exits))
    if not exits or not set(exits) <= set(config.exit_layers):
        raise ValueError(f"exits must be some of the model's, {config.exit_layers}, got {exits}.")
    if cascade:
        check_preprocessing(image_processor, config)
        if len(config.exit_layers) < 2:
            raise ValueError(
                f"a cascade needs at least two exits; the model has one, on layer {config.exit_layers[0]}."
            )
        if early_exit:
            config.resolve_exit_thresholds()  # says that there are none
            if quantization and config.calibration is None:
                raise ValueError(
                    "the thresholds were set by hand, and scores move in a lower precision; calibrate the model, or "
                    "export it without early exit."
                )
        if quantization and config.calibration:
            target = CalibrationTarget.from_dict(config.calibration["target"])
            check_sample_size(len(quantization.calibration), target)  # type: ignore[arg-type]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty.")

    model = model.float().cpu().eval()
    files = [exit_file(layer, config.exit_layers) for layer in exits]
    if cascade:
        config.early_exit = early_exit
        files += [file for layer in config.exit_layers for file in cascade_files(layer)]
    report = None
    with atomic_directory(output) as directory:
        for file in files:
            export_and_compare(model, file, directory)
        image_processor.save_pretrained(directory)
        if cascade:
            shutil.copy(cascade_mevit.__file__, directory)
            runtime = cascade_mevit.Cascade(directory, config=config.to_dict(), stages=cascade_stages(config))
            compare_cascade(model, runtime)
            compare_preprocessing(image_processor, runtime)
        if quantization and page:
            kept = keep_float32(directory, [file.name for file in files if file.kind != "exit"])
            image_processor.save_pretrained(kept)
            config.save_pretrained(kept)
            _write_json(kept / "cascade.json", cascade_description(config, None))
        if quantization:
            report = lower_precision(directory, files, config, quantization)
            _write_json(directory / "precision.json", report.to_dict())
        config.early_exit = config.early_exit and early_exit
        # the last ones, since without them nothing loads
        config.save_pretrained(directory)
        if cascade:
            _write_json(directory / "cascade.json", cascade_description(config, quantization))
        if page:
            page.write(directory)
    return Export(output, {file.name: (output / file.name).stat().st_size for file in files}, report)


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """A new directory beside `output` to write to, which is renamed to `output` at the end.

    After an [`ExportError`] it is kept under another new name, which the error tells; after anything else that stops
    the writing it is removed.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=output.parent) as temporary:
        directory = Path(temporary, output.name)  # with ordinary permissions, which `temporary` has not
        directory.mkdir()
        try:
            yield directory
        except ExportError as error:
            failed = output.with_name(f"{output.name}.failed-{Path(temporary).name.removeprefix(prefix)}")
            directory.rename(failed)
            raise ExportError(f"{error} What was written is in {failed}.") from error
        if output.exists():
            output.rmdir()  # empty, or this fails
        directory.rename(output)


def export_and_compare(model: MEViTForImageClassification, file: GraphFile, directory: Path) -> None:
    """Exports one graph with Optimum, and compares the file's outputs with the graph's on the same input.

    Raises:
        ExportError: where they differ by more than 1e-4.
    """
    graph = build_graph(model, file)
    module, onnx_config = graph.module.eval(), graph.onnx_config()
    _, (outputs,) = export_models({file.name: (module, onnx_config)}, directory, opset=OPSET, output_names=[file.name])
    try:
        validate_model_outputs(
            onnx_config, module, directory / file.name, outputs, atol=TOLERANCE, use_subprocess=False
        )
    except Exception as error:  # Optimum has a class for each kind of difference
        raise ExportError(f"{file.name} differs from PyTorch: {' '.join(str(error).split())}") from error


def cascade_description(config: MEViTConfig, quantization: Quantization | None) -> dict[str, Any]:
    """What `cascade.json` holds: the graphs. The runtime finds the rest in the model's and the processor's config."""
    return {
        "precision": quantization.precision if quantization else "float32",
        "target": quantization.target if quantization else None,
        "stages": cascade_stages(config),
    }


def check_preprocessing(image_processor: BaseImageProcessor, config: MEViTConfig) -> None:
    """Raises a `ValueError` where the runtime cannot do what the image processor does."""
    cascade_mevit.read_preprocessing(json.loads(image_processor.to_json_string()), to_2tuple(config.image_size))


def compare_preprocessing(image_processor: BaseImageProcessor, cascade: cascade_mevit.Cascade) -> None:
    """Has the runtime of an export and the image processor read an image of noise.

    Raises:
        ExportError: where they differ by more than half a grey level on average.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image_processor(image, return_tensors="np")["pixel_values"])
    settings = cascade.preprocessing
    grey_level = settings.rescale / min(settings.std)
    difference = np.abs(cascade.preprocess([image]) - expected).mean()
    if not difference <= grey_level / 2:
        raise ExportError(
            f"the runtime must prepare images as the image processor does; they differ by "
            f"{difference / grey_level:.1f} grey levels on average, allowed is 0.5."
        )


@torch.no_grad()
def compare_cascade(model: MEViTForImageClassification, cascade: cascade_mevit.Cascade) -> None:
    """Compares an exported cascade with PyTorch on noise: the logits of every exit, and where and with which logits
    images leave.

    They leave under thresholds in the midst of their scores, so that some go on at every exit.

    Raises:
        ExportError: where logits differ by more than 1e-4, or an image leaves elsewhere, unless one of its scores is
            borderline.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    # not the batch size that the graphs were traced with
    pixel_values = torch.randn(8, config.num_channels, *to_2tuple(config.image_size), generator=generator)
    expected = model(pixel_values, early_exit=False)
    logits, _ = cascade.every_exit(pixel_values.numpy())
    differences = np.abs(logits - expected.exit_logits.numpy()).max((0, 2))
    for layer, difference in zip(config.exit_layers, differences, strict=True):
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the cascade's logits of exit {layer} differ from PyTorch's by {difference:.2e}; "
                f"allowed is {TOLERANCE}."
            )
    thresholds = _midway(expected.exit_scores[:, :-1].double().numpy())
    output = cascade(pixel_values.numpy(), early_exit=True, exit_thresholds=thresholds)
    exit_layer = model(pixel_values, early_exit=True, exit_thresholds=thresholds).exit_layer.numpy()
    elsewhere = (output.exit_layer != exit_layer) & ~output.borderline
    if elsewhere.any():
        raise ExportError(f"{elsewhere.sum()} of {len(elsewhere)} images leave the cascade at another exit.")
    combined = combine_exits(config.exit_combination, expected.exit_logits).numpy()
    places = np.searchsorted(config.exit_layers, output.exit_layer)
    difference = np.abs(output.logits - combined[np.arange(len(places)), places]).max()
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the logits with which images leave the cascade differ from PyTorch's by {difference:.2e}; "
            f"allowed is {TOLERANCE}."
        )


def _midway(scores: np.ndarray) -> list[float]:
    """For each early exit, a threshold midway between two of its scores (B, E − 1), half of which are under it."""
    thresholds = []
    for given in scores.T:
        values = np.unique(given)
        middle = len(values) // 2
        # a single value, which every image has at the first exit under patience: none leaves
        thresholds.append(float(values[middle - 1 : middle + 1].mean()) if middle else float(values[0]) - 1)
    return thresholds


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
