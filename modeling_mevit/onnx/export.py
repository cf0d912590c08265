# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Export of a trained model: a file for each exit, and the cascade, each compared with PyTorch before it counts."""

import copy
import ctypes
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
import transformers
from PIL import Image
from transformers import BaseImageProcessor

from ..configuration_mevit import MEViTConfig
from ..data.image_processing import on_pillow
from ..early_exit import monitoring
from ..early_exit.calibration import check_sample_size
from ..early_exit.calibration_target import CalibrationTarget
from ..exit_policy_mevit import combine_exits
from ..modeling_mevit import MEViTForImageClassification
from ..vit_backbone_mevit import to_2tuple
from . import cascade_mevit
from .graphs import Graph, GraphFile, build_graph, cascade_description, cascade_files, exit_file
from .page import WebPage, keep_float32
from .quantize import PrecisionReport, Quantization, lower_precision, unfinished_cascade
from .triton_repository import write_repository
from .writer import write_graph


TOLERANCE = 1e-4  # of float32 outputs, absolute
GREY_LEVELS = 0.1  # by which a pixel value may differ; torchvision's resize differs from Pillow's by one
COMPARED_BATCHES = (1, 2)  # not what a graph was traced with

Write = Callable[[Graph, Path], None]


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
    exporter: Literal["torch", "optimum"] = "torch",
    page: WebPage | None = None,
    triton: bool = False,
) -> Export:
    """Writes `exit_k.onnx` for each exit asked for, the last one as `model.onnx`, and the cascade.

    Everything is written to a new directory beside `output` and renamed when every file gave the same outputs as
    PyTorch, within 1e-4; where one did not, it is kept as `output.failed-…`, which the error names. An export that is
    interrupted is removed; what is left of one that was killed, `.output-…`, has neither config.json nor cascade.json,
    so that it does not load.

    Args:
        model: it is brought to the CPU, to float32 and into eval mode, and stays there.
        image_processor: of the model; where Transformers 5 has it resize with torchvision, the same on Pillow counts.
        output: directory that does not exist yet, or is empty.
        exits: exit layers to export a file for; by default all, and with the cascade none but the last one, which a
            cascade always has beside it.
        cascade: whether to export the chain of stages too.
        early_exit: whether the cascade leaves early unless told otherwise, by the thresholds of the model's config.
        quantization: what to lower the precision with, once the float32 files are right.
        exporter: what writes the files of exits: PyTorch's own exporter, which writes the cascade too, or Optimum's,
            which needs Transformers 4.57.
        page: to add to the cascade, to run it in a browser. With a lower precision it offers float32 too, whose files
            are kept in a folder of that name.
        triton: whether to add a model repository for Triton Inference Server, in the folder `triton`, which serves the
            cascade.

    Raises:
        ValueError: where the model lacks what is asked for, the runtime cannot prepare images as the image processor
            does, too few images are given to certify the thresholds anew, `output` is not empty, or the exporter
            cannot be used here.
        ExportError: where a file's outputs differ from PyTorch's.
    """
    output, image_processor = Path(output).resolve(), on_pillow(image_processor)
    if page and not cascade:
        raise ValueError("a page runs the cascade; export that too.")
    if page and quantization and quantization.precision == "bfloat16":
        raise ValueError("a page runs in a browser, which does not compute in bfloat16; leave the page out.")
    if triton and not cascade:
        raise ValueError("Triton's model repository serves the cascade; export that too.")
    if triton and quantization and quantization.precision == "bfloat16":
        raise ValueError(
            "Triton's model repository runs in ONNX Runtime, which does not compute in bfloat16; leave it out."
        )
    config = copy.deepcopy(model.config)
    with_file = set(exits if exits is not None else config.exit_layers[-1:] if cascade else config.exit_layers)
    if not with_file or not with_file <= set(config.exit_layers):
        raise ValueError(f"exits must be some of the model's, {config.exit_layers}, got {sorted(with_file)}.")
    if cascade:
        with_file.add(config.exit_layers[-1])
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
            chosen_in = ((config.calibration or {}).get("made_for") or {}).get("dtype", "float32")
            if (page or not quantization) and chosen_in != "float32":
                raise ValueError(
                    f"the thresholds were chosen in {chosen_in}, and this export has float32 files, whose scores "
                    f"differ; export with a lower precision and no page, for which they are chosen anew, calibrate in "
                    f"float32, or export without early exit."
                )
        if quantization and config.calibration:
            target = CalibrationTarget.from_dict(config.calibration["target"])
            check_sample_size(len(quantization.calibration), target)  # type: ignore[arg-type]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty.")

    write_exit = _writer(exporter)

    model = model.float().cpu().eval()
    files = [exit_file(layer, config.exit_layers) for layer in sorted(with_file)]
    if cascade:
        config.early_exit = early_exit
        files += [file for layer in config.exit_layers for file in cascade_files(layer)]
    report = None
    with atomic_directory(output) as directory:
        for file in files:
            export_and_compare(model, file, directory, write_exit if file.kind == "exit" else write_graph)
        image_processor.save_pretrained(directory)
        if cascade:
            shutil.copy(cascade_mevit.__file__, directory)
            shutil.copy(monitoring.__file__, directory / "monitoring_mevit.py")
            runtime = unfinished_cascade(directory, config, options=_frugal_options())
            compare_cascade(model, runtime)
            compare_preprocessing(image_processor, runtime)
            if quantization and quantization.precision == "bfloat16":  # whose own differences hide others
                compare_cascade(model, unfinished_cascade(directory, config, backend="openvino", precision="float32"))
        if quantization and page:
            kept = keep_float32(directory, [file.name for file in files if file.kind != "exit"])
            image_processor.save_pretrained(kept)
            config.save_pretrained(kept)
            _write_json(kept / "cascade.json", cascade_description(config))
        if quantization:
            report = lower_precision(directory, files, config, quantization)
            _write_json(directory / "precision.json", report.to_dict())
        config.early_exit = config.early_exit and early_exit
        # the last ones, since without them nothing loads
        config.save_pretrained(directory)
        if cascade:
            lowered = (quantization.precision, quantization.target) if quantization else ()
            _write_json(directory / "cascade.json", cascade_description(config, *lowered))
        if page:
            page.write(directory)
        if triton:
            write_repository(directory)
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


def export_and_compare(model: MEViTForImageClassification, file: GraphFile, directory: Path, write: Write) -> None:
    """Writes one graph, and compares the file with PyTorch.

    Raises:
        ExportError: where outputs differ by more than 1e-4.
    """
    graph = build_graph(model, file)
    write(graph, directory / file.name)
    compare_graph(graph, directory / file.name)
    _return_freed_memory()


@torch.no_grad()
def compare_graph(graph: Graph, file: Path) -> None:
    """Compares a file's outputs with the graph's on noise: for one image and for two, with one query token and all.

    Raises:
        ExportError: where they differ by more than 1e-4, or the file does not run.
    """
    opened = cascade_mevit.OnnxRuntimeGraph(file, _frugal_options())
    for batch, queries in zip(COMPARED_BATCHES, (1, graph.num_queries), strict=True):
        inputs = graph.noise(batch, queries)
        expected = graph.module(**inputs)
        try:
            given = cascade_mevit.run(opened, {name: value.numpy() for name, value in inputs.items()})
        except ValueError as error:
            raise ExportError(f"{file.name} does not run on {_sizes(inputs)}: {error}") from error
        if list(given) != list(expected):
            raise ExportError(f"the outputs of {file.name} must be {list(expected)}, got {list(given)}.")
        for name, value in expected.items():
            shape = tuple(given[name].shape)
            if shape != tuple(value.shape):
                raise ExportError(f"{name} of {file.name} must have shape {tuple(value.shape)}, got {shape}.")
            difference = np.abs(given[name] - value.numpy()).max()
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{name} of {file.name} differs from PyTorch's by {difference:.2e} on {_sizes(inputs)}; "
                    f"allowed is {TOLERANCE}."
                )


def check_preprocessing(image_processor: BaseImageProcessor, config: MEViTConfig) -> None:
    """Raises a `ValueError` where the runtime cannot do what the image processor does."""
    cascade_mevit.read_preprocessing(json.loads(image_processor.to_json_string()), to_2tuple(config.image_size))


def compare_preprocessing(image_processor: BaseImageProcessor, cascade: cascade_mevit.Cascade) -> None:
    """Has the runtime of an export and the image processor read an image of noise.

    Raises:
        ExportError: where a value differs by more than a tenth of a grey level.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image_processor(image, return_tensors="np")["pixel_values"])
    settings = cascade.preprocessing
    in_grey_levels = np.asarray(settings.std)[:, None, None] / settings.rescale
    difference = (np.abs(cascade.preprocess([image]) - expected) * in_grey_levels).max()
    if not difference <= GREY_LEVELS:
        raise ExportError(
            f"the runtime must prepare images as the image processor does; a value differs by {difference:.1f} grey "
            f"levels, allowed is {GREY_LEVELS}."
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
    # two at a time: not the batch size that the graphs were traced with, and little memory beside the weights
    pairs = torch.randn(4, 2, config.num_channels, *to_2tuple(config.image_size), generator=generator)
    outputs = [model(pair, early_exit=False) for pair in pairs]
    exit_logits, scores = (torch.cat([one[name] for one in outputs]) for name in ("exit_logits", "exit_scores"))
    logits = np.concatenate([cascade.every_exit(pair.numpy())[0] for pair in pairs])
    differences = np.abs(logits - exit_logits.numpy()).max((0, 2))
    for layer, difference in zip(config.exit_layers, differences, strict=True):
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the cascade's logits of exit {layer} differ from PyTorch's by {difference:.2e}; "
                f"allowed is {TOLERANCE}."
            )
    early: dict[str, Any] = {"early_exit": True, "exit_thresholds": _midway(scores[:, :-1].double().numpy())}
    taken = [cascade(pair.numpy(), **early) for pair in pairs]
    output = cascade_mevit.CascadeOutput(*(np.concatenate(arrays) for arrays in zip(*taken, strict=True)))
    exit_layer = torch.cat([model(pair, **early).exit_layer for pair in pairs]).numpy()
    elsewhere = (output.exit_layer != exit_layer) & ~output.borderline
    if elsewhere.any():
        raise ExportError(f"{elsewhere.sum()} of {len(elsewhere)} images leave the cascade at another exit.")
    combined = combine_exits(config.exit_combination, exit_logits).numpy()
    places = np.searchsorted(config.exit_layers, output.exit_layer)
    difference = np.abs(output.logits - combined[np.arange(len(places)), places]).max()
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the logits with which images leave the cascade differ from PyTorch's by {difference:.2e}; "
            f"allowed is {TOLERANCE}."
        )


def _writer(exporter: str) -> Write:
    """The function that writes a graph.

    Raises:
        ValueError: where the exporter is unknown, or does not run beside this version of Transformers.
    """
    if exporter == "torch":
        return write_graph
    if exporter != "optimum":
        raise ValueError(f"exporter must be 'torch' or 'optimum', got {exporter!r}.")
    try:
        from .optimum_exporter import write_graph_with_optimum
    except ImportError as error:  # of Optimum, or of what it imports of Transformers
        raise ValueError(
            f"exporter must be 'torch' here, got 'optimum', which cannot be imported beside Transformers "
            f"{transformers.__version__} ({error}); pip install 'mevit[optimum]' brings a version that it runs on."
        ) from error
    return write_graph_with_optimum


def _frugal_options() -> onnxruntime.SessionOptions:
    """Of sessions that hold weights once: neither laid out anew for speed, nor in an arena that rounds sizes up."""
    options = onnxruntime.SessionOptions()
    for entry in ("disable_prepacking", "use_device_allocator_for_initializers"):
        options.add_session_config_entry(f"session.{entry}", "1")
    return options


def _return_freed_memory() -> None:
    """Gives what a session has freed back to the system, where the C library is glibc, which would keep most of it.

    The next session then starts from the model alone; otherwise it adds up to half of the model to the peak.
    """
    with suppress(AttributeError, OSError, TypeError):  # of another C library, or none that can be asked
        ctypes.CDLL(None).malloc_trim(0)


def _sizes(inputs: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())


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
