# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exported graphs in lower precision, thresholds that fit their scores, and what it costs in accuracy.

float16 takes everything but the exits' heads, which stay in float32: norms of exits that were standardised have large
weights, whose products do not fit. int8 multiplies weights and activations of MatMul and Gemm as integers; their
products, the exits' heads, the attention's own products and everything else stay in float32. Activation ranges come
from training images, or with int8-dynamic from the batch at hand, so that a result then depends on the images beside
it. bfloat16 is float32 files that OpenVINO runs in it. Thresholds are chosen anew on calibration images, since scores
move.
"""

import copy
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..configuration_mevit import MEViTConfig
from ..early_exit.calibration import CalibrationResult, calibrate, disable_early_exit
from ..early_exit.calibration_target import CalibrationTarget
from ..early_exit.predictions import batches, check_labels
from .cascade_mevit import (
    TOKENS,
    Cascade,
    OnnxRuntimeGraph,
    OpenVINOGraph,
    RunnableGraph,
    openvino_precisions,
    query_inputs,
    run,
    run_stage,
    stage_inputs,
)
from .graphs import GraphFile, cascade_description
from .runtime import MEViTCascade
from .writer import write_model


PRECISIONS = ("float16", "bfloat16", "int8", "int8-dynamic")
WITHOUT_TARGET = ("float16", "bfloat16")
NUM_TRAINING_IMAGES = 128  # for activation ranges, drawn at random
HEADS = ("classifier.", "uncertainty.")  # in the names of weights that stay in float32
QUANTIZED = ("MatMul", "Gemm")
CPU_INFO = Path("/proc/cpuinfo")  # on Linux


@dataclass(frozen=True)
class TargetSettings:
    """How int8 files are made for one kind of processor.

    Args:
        activation_type: unsigned on x86, whose instruction multiplies unsigned by signed numbers; signed on ARM.
        reduce_range: whether weights take 7 bits, since the processor adds up products with saturation.
    """

    activation_type: QuantType
    reduce_range: bool


# as ONNX Runtime recommends (documentation of `quantize_static`); weights are signed everywhere
TARGETS = {
    "arm64": TargetSettings(QuantType.QInt8, reduce_range=False),
    "avx2": TargetSettings(QuantType.QUInt8, reduce_range=True),
    "avx512_vnni": TargetSettings(QuantType.QUInt8, reduce_range=False),
}


@dataclass(frozen=True)
class Quantization:
    """What an export needs to lower its precision.

    Args:
        precision: one of `PRECISIONS`.
        calibration: calibration images, `{"pixel_values", "labels"}`, for thresholds and for the report, which needs
            labels.
        training: training images, for the ranges of activations, which `"int8"` alone needs.
        target: the processor that int8 files are for, one of `TARGETS`; this machine's by default. Files for another
            one run too, but slower or less accurately.

    Raises:
        ImportError: where bfloat16 is asked for and OpenVINO is not installed.
        ValueError: where the precision or the target is unknown, a target is given for float16 or bfloat16, int8 has
            no training images, or this machine's processor does not compute in bfloat16.
    """

    precision: str
    calibration: Dataset
    training: Dataset | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {self.precision!r}.")
        if self.precision in WITHOUT_TARGET:
            if self.target is not None:
                raise ValueError(
                    f"target must be left out with {self.precision}, whose files are the same everywhere, got "
                    f"{self.target!r}."
                )
            if self.precision == "bfloat16":
                _check_bfloat16()
            return
        if self.target is None:
            object.__setattr__(self, "target", host_target())
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(map(repr, TARGETS))}, got {self.target!r}.")
        if self.precision == "int8" and self.training is None:
            raise ValueError("precision 'int8' needs training images, for the ranges of activations, got None.")


@dataclass(frozen=True)
class PrecisionReport:
    """What lowering the precision of an export did.

    Args:
        precision: of the files.
        target: the processor that int8 files are for; None of others.
        num_samples: calibration images.
        accuracy: name of each file that takes an image to logits → accuracy before, in float32, and after, on these
            images.
        calibration: what choosing the cascade's thresholds anew gave; None where there was nothing to choose.
    """

    precision: str
    target: str | None
    num_samples: int
    accuracy: dict[str, tuple[float, float]]
    calibration: CalibrationResult | None

    def to_dict(self) -> dict[str, Any]:
        """What `precision.json` holds; the thresholds and what they gave are in `config.json`."""
        return {
            "precision": self.precision,
            "target": self.target,
            "num_samples": self.num_samples,
            "accuracy": {
                name: {"float32": before, self.precision: after} for name, (before, after) in self.accuracy.items()
            },
        }


def host_target() -> str:
    """The target of this machine.

    Raises:
        ValueError: where it has a processor of another kind.
    """
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return "arm64"
    if machine not in ("x86_64", "amd64"):
        raise ValueError(f"a target must be given on a machine of type {machine!r}: {', '.join(map(repr, TARGETS))}.")
    flags = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    # avx_vnni are the same instructions on shorter registers
    return "avx512_vnni" if "avx512_vnni" in flags or "avx_vnni" in flags else "avx2"


def lower_precision(
    directory: Path, files: Sequence[GraphFile], config: MEViTConfig, quantization: Quantization
) -> PrecisionReport:
    """Lowers the precision of a float32 export in place.

    Args:
        directory: of the export; it needs neither config.json nor cascade.json yet.
        files: of the export.
        config: of the model; it gets new thresholds, or none where early exit cannot be kept.
        quantization: what to do.

    Raises:
        ValueError: where the calibration images have no labels.
    """
    dataset = quantization.calibration
    check_labels(dataset, "a lower precision")
    classifiers = [file.name for file in files if file.kind == "exit"]
    before = {name: accuracy(OnnxRuntimeGraph(directory / name), dataset) for name in classifiers}
    convert(directory, files, config, quantization)
    after = {name: accuracy(_open(directory / name, quantization.precision), dataset) for name in classifiers}
    result = None
    if config.calibration and any(file.kind == "stage" for file in files):
        cascade = MEViTCascade(unfinished_cascade(directory, config, quantization.precision), config)
        target = CalibrationTarget.from_dict(config.calibration["target"])
        alone = 1 if quantization.precision == "int8-dynamic" else 32  # as it will run on the edge
        result = calibrate(cascade, dataset, target, batch_size=alone)
        result.apply_to(config)
    else:
        disable_early_exit(config)  # thresholds are of float32 scores
    return PrecisionReport(
        precision=quantization.precision,
        target=quantization.target,
        num_samples=len(dataset),  # type: ignore[arg-type]
        accuracy={name: (before[name], after[name]) for name in classifiers},
        calibration=result,
    )


def convert(directory: Path, files: Sequence[GraphFile], config: MEViTConfig, quantization: Quantization) -> None:
    """Rewrites every graph of an export in another precision. Inputs and outputs stay float32. For bfloat16 nothing is
    written: OpenVINO computes in it with the same files.

    Args:
        directory: of a float32 export.
        files: of the export.
        config: of the model.
        quantization: precision and target, and training images for int8.
    """
    if quantization.precision == "bfloat16":
        return
    names = [file.name for file in files]
    precision, target = quantization.precision, quantization.target
    fed: Iterable[tuple[str, list[dict[str, np.ndarray]] | None]] = ((name, None) for name in names)
    if precision == "int8":
        assert quantization.training is not None  # which `Quantization` asks for
        fed = training_feeds(directory, files, config, quantization.training)
    # the cascade runs in float32 until all of it is converted
    with tempfile.TemporaryDirectory(dir=directory) as converted:
        for name, feeds in tqdm(fed, precision, len(names), unit="graph"):
            source, destination = directory / name, Path(converted, name)
            if target is None:
                _to_float16(source, destination)
            else:
                _to_int8(source, destination, TARGETS[target], feeds)
        for name in names:
            Path(converted, name).replace(directory / name)


def accuracy(graph: RunnableGraph, dataset: Dataset, *, batch_size: int = 32) -> float:
    """Accuracy of a graph that takes images to logits, as a share of the images."""
    correct = 0
    for batch in batches(dataset, batch_size, 0, "accuracy"):
        logits = run(graph, {"pixel_values": batch["pixel_values"].numpy()})["logits"]
        correct += int((logits.argmax(-1) == batch["labels"].numpy()).sum())
    return correct / len(dataset)  # type: ignore[arg-type]


def _to_float16(source: Path, destination: Path) -> None:
    """Writes a graph in float16, all but the heads of exits.

    The converter can leave nodes in float32, but rounds what one hands to the next to float16. So the heads are cut
    off, what they read becomes an output of the rest, which the converter gives in float32, and they are put back.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    graph = model.graph
    places = sorted(_nodes_of_heads(graph))
    head, outputs = [copy.deepcopy(graph.node[place]) for place in places], copy.deepcopy(list(graph.output))
    for place in reversed(places):
        del graph.node[place]
    read_by_head, read_by_trunk = ({name for node in nodes for name in node.input} for nodes in (head, graph.node))
    made_by_trunk = {name for node in graph.node for name in node.output}
    handed_over = read_by_head & made_by_trunk
    _keep(graph.output, lambda value: value.name in made_by_trunk)
    known = {value.name for value in graph.output}
    graph.output.extend(value for value in graph.value_info if value.name in handed_over - known)
    _keep(graph.value_info, lambda value: value.name in made_by_trunk)
    weights = [copy.deepcopy(weight) for weight in graph.initializer if weight.name in read_by_head]
    _keep(graph.initializer, lambda weight: weight.name in read_by_trunk)
    shared = {weight.name: f"{weight.name}_of_head" for weight in weights if weight.name in read_by_trunk}
    for weight in weights:
        weight.name = shared.get(weight.name, weight.name)
    for node in head:  # the rest's own will be in float16
        node.input[:] = [shared.get(name, name) for name in node.input]

    model = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    graph = model.graph
    graph.node.extend(head)
    graph.initializer.extend(weights)
    for field, values in (("output", outputs), ("value_info", [])):  # types of the rest are not needed any more
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    converted = onnx_ir.from_proto(model)
    converted.graph.sort()  # the converter puts its casts last
    with destination.open("wb") as opened:
        write_model(converted, opened)


def _nodes_of_heads(graph: onnx.GraphProto) -> set[int]:
    """Places of the nodes of exits' heads: from the norm that a classifier reads to logits and score.

    Classifiers are told by the names of their weights, and everything else by what it is connected with: the norm's
    name depends on the exit and the exporter.
    """
    weights = {weight.name for weight in graph.initializer if any(head in weight.name for head in HEADS)}
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output}
    heads = {place for place, node in enumerate(graph.node) if weights.intersection(node.input)}
    behind = sorted(heads)
    while behind:  # from classifiers back to their norms
        node = graph.node[behind.pop()]
        read = node.input[1:] if node.op_type == "LayerNormalization" else node.input
        found = {makers[name] for name in read if name in makers} - heads
        heads |= found
        behind += found
    made = {name for place in heads for name in graph.node[place].output}
    for place, node in enumerate(graph.node):  # in topological order, as they lie in a file
        if made.intersection(node.input):
            heads.add(place)
            made.update(node.output)
    return heads


def _keep(values: Any, is_kept: Callable[[Any], bool]) -> None:
    """Removes values from a repeated field."""
    for place in reversed(range(len(values))):
        if not is_kept(values[place]):
            del values[place]


def _to_int8(
    source: Path, destination: Path, settings: TargetSettings, feeds: Iterable[dict[str, np.ndarray]] | None
) -> None:
    """Writes a graph in int8, with activation ranges from what it is fed, or dynamic ones where nothing is given."""
    if feeds is None:
        quantize_dynamic(source, destination, **_int8_arguments(source, settings))
    else:
        quantize_static(source, destination, Feeds(feeds), **static_int8_arguments(source, settings))


def static_int8_arguments(source: Path, settings: TargetSettings) -> dict[str, Any]:
    """How `quantize_static` makes int8 files.

    Ranges are the smallest and the largest value: a few tokens have activations many times larger than all others,
    which these ViTs need; percentiles cut them off. Products are not rounded to 8 bits, which would cost accuracy and,
    since ONNX Runtime then has to make floats of them again for what comes next, time.
    """
    return {
        **_int8_arguments(source, settings),
        "quant_format": QuantFormat.QDQ,
        "activation_type": settings.activation_type,
        "extra_options": {"OpTypesToExcludeOutputQuantization": list(QUANTIZED)},
    }


def _int8_arguments(source: Path, settings: TargetSettings) -> dict[str, Any]:
    return {
        "op_types_to_quantize": list(QUANTIZED),
        "nodes_to_exclude": _nodes_in_float(onnx.load(source)),
        "per_channel": True,
        "reduce_range": settings.reduce_range,
        "weight_type": QuantType.QInt8,
    }


class Feeds(CalibrationDataReader):  # type: ignore[misc]
    """Inputs of a graph, one after another, as ONNX Runtime asks for them."""

    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]):
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def training_feeds(
    directory: Path, files: Sequence[GraphFile], config: MEViTConfig, training: Dataset
) -> Iterator[tuple[str, list[dict[str, np.ndarray]]]]:
    """Each graph's file name, with what it is fed while training images run through the export one by one.

    All images pass one stage before any passes the next, so that each graph runs on each image once, and what is held
    is what one stage makes of them. A query graph gets all tokens at once, [CLS] and the others.
    """
    drawn = np.random.default_rng(0).permutation(len(training))[:NUM_TRAINING_IMAGES]  # type: ignore[arg-type]
    images = [training[int(index)]["pixel_values"][None].numpy() for index in drawn]
    for file in files:
        if file.kind == "exit":
            yield file.name, [{"pixel_values": image} for image in images]
    stages = [file.name for file in files if file.kind == "stage"]
    queries = [file.name for file in files if file.kind == "query"]
    if not stages:
        return
    cascade = unfinished_cascade(directory, config)
    states = images
    # of log-probabilities, where exits are combined: only heads read it, which stay in float32, so no range needs it
    no_sum = np.zeros((1, config.num_labels), dtype=np.float32)
    for stage_file, query_file, (stage, query) in zip(stages, queries, cascade.stages, strict=True):
        yield stage_file, [stage_inputs(stage, state) for state in states]
        handed_on = [run_stage(stage, state) for state in states]
        feeds = [query_inputs(query, tokens, TOKENS, no_sum) for tokens in handed_on]
        yield query_file, feeds
        states = [run(query, feed)["outputs"] for feed in feeds]


def unfinished_cascade(directory: Path, config: MEViTConfig, made_for: str = "float32", **options: Any) -> Cascade:
    """The cascade of an export that has its graphs and no config yet. Its thresholds are not used."""
    uncalibrated = {**config.to_dict(), "calibration": None}
    return Cascade(directory, config=uncalibrated, description=cascade_description(config, made_for), **options)


def _open(file: Path, precision: str) -> RunnableGraph:
    """A graph of an export that was made for a precision."""
    return OpenVINOGraph(file, precision) if precision == "bfloat16" else OnnxRuntimeGraph(file)


def _check_bfloat16() -> None:
    """Raises a `ValueError` where OpenVINO does not compute in bfloat16 here."""
    able = openvino_precisions()
    if "bfloat16" not in able:
        raise ValueError(
            f"precision 'bfloat16' needs a processor that computes in it (AVX-512 BF16 or AMX), got one of "
            f"{', '.join(able)}."
        )


def _nodes_in_float(model: onnx.ModelProto) -> list[str]:
    """Heads, and products of two activations: the nodes that are not quantized.

    Heads are told by the names of their weights, which every exporter keeps; nodes have other names with each.
    """
    weights = {initializer.name for initializer in model.graph.initializer}

    def is_quantized(node: onnx.NodeProto) -> bool:
        given = weights.intersection(node.input)
        return bool(given) and not any(head in name for head in HEADS for name in given)

    return [node.name for node in model.graph.node if node.op_type in QUANTIZED and not is_quantized(node)]
