# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exported graphs in lower precision, thresholds that fit their scores, and what it costs in accuracy.

int8 multiplies weights and activations of MatMul and Gemm as integers and leaves the exits' heads, the attention's own
products and everything else in float32. Activation ranges come from training images, or with int8-dynamic from the
batch at hand, so that an answer then depends on the images beside it. Thresholds are chosen anew on calibration
images, since scores move.
"""

import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..calibration import Certificate, calibrate, disable_early_exit, enable_early_exit
from ..configuration_mevit import MEViTConfig
from ..exit_record import ExitPredictions
from .cascade_mevit import Cascade


PRECISIONS = ("float16", "int8", "int8-dynamic")
HEADS = ("classifier", "uncertainty")  # in the names of nodes that stay in float32
QUANTIZED = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Quantization:
    """What an export needs to lower its precision.

    Args:
        precision: one of `PRECISIONS`.
        training: data set of training images, `{"pixel_values", "labels"}`, for the ranges of activations.
        calibration: data set of calibration images, for thresholds and for the report.
        source: what describes the calibration images, for the config.
        reduce_range: see [`convert`].
        training_images: how many of the training images are used, drawn at random.
    """

    precision: str
    training: Dataset
    calibration: Dataset
    source: dict[str, Any]
    reduce_range: bool | None = None
    training_images: int = 128

    def apply(self, directory: Path, config: MEViTConfig) -> Certificate | None:
        """Lowers the precision of a float32 export in place, and writes `precision.json`: what that costs.

        Args:
            directory: of the export.
            config: of the model; it gets the new thresholds, or none where early exit cannot be kept.

        Returns:
            What [`recalibrate`] found, None where there was nothing to calibrate.
        """
        before = accuracies(directory, self.calibration)
        drawn = np.random.default_rng(0).permutation(len(self.training))[: self.training_images]
        images = [self.training[int(index)]["pixel_values"][None].numpy() for index in drawn]
        convert(directory, self.precision, images, reduce_range=self.reduce_range)
        after = accuracies(directory, self.calibration)
        found = None
        if config.calibration and (directory / "cascade.json").is_file():
            alone = 1 if self.precision == "int8-dynamic" else 32  # as the edge will run it
            record = record_cascade(Cascade(directory), self.calibration, batch_size=alone)
            found = recalibrate(directory, config, record, self.source)
        elif config.exit_policy != "patience":
            disable_early_exit(config)  # thresholds are of float32 scores
        report = {
            "precision": self.precision,
            "images": len(self.calibration),
            "accuracy": {name: {"float32": before[name], self.precision: after[name]} for name in before},
            "early_exit": asdict(found.granted.outcome) if found and found.granted else None,
            "refused": asdict(found.refused.outcome) if found and found.refused else None,
        }
        (directory / "precision.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return found


def convert(
    directory: Path, precision: str, images: Iterable[np.ndarray], *, reduce_range: bool | None = None
) -> None:
    """Rewrites every graph of an export in another precision. Inputs and outputs stay float32.

    Args:
        directory: of a float32 export.
        precision: `"float16"`, `"int8"` (static) or `"int8-dynamic"`.
        images: (1, C, H, W) each, of training; read once for each graph, by `"int8"` only.
        reduce_range: whether weights take 7 bits, so that sums of products fit where the processor has no VNNI. By
            default as this processor needs it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; allowed are {', '.join(map(repr, PRECISIONS))}.")
    if reduce_range is None:
        reduce_range = needs_reduced_range()
    converted = directory / "converted"
    converted.mkdir()
    files = sorted(directory.glob("*.onnx"))
    for file in tqdm(files, desc=precision, unit="graph"):
        model, target = onnx.load(file), converted / file.name
        if precision == "float16":
            onnx.save(convert_float_to_float16(model, keep_io_types=True), target)
            continue
        settings = {
            "op_types_to_quantize": list(QUANTIZED),
            "nodes_to_exclude": _nodes_in_float(model),
            "per_channel": True,
            "reduce_range": reduce_range,
            "weight_type": QuantType.QInt8,
        }
        if precision == "int8-dynamic":
            quantize_dynamic(file, target, **settings)
            continue
        is_arm = platform.machine().lower() in ("aarch64", "arm64")
        quantize_static(
            file,
            target,
            _Feeds(_inputs_of(file, images)),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8 if is_arm else QuantType.QUInt8,
            **settings,
        )
    for file in files:
        shutil.move(converted / file.name, file)
    converted.rmdir()


def needs_reduced_range() -> bool:
    """Whether this processor adds up products of 8 bits with saturation: an x86 one without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    cpu_info = Path("/proc/cpuinfo")
    flags = cpu_info.read_text() if cpu_info.exists() else ""
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


def record_cascade(cascade: Cascade, dataset: Dataset, *, batch_size: int = 32) -> ExitPredictions:
    """Runs an exported cascade to its end on every image: what each exit says of it."""
    labels, predictions, scores = [], [], []
    for batch in tqdm(DataLoader(dataset, batch_size), desc="cascade", unit="batch"):
        logits, given = cascade.every_exit(batch["pixel_values"].numpy())
        labels.append(batch["labels"].numpy())
        predictions.append(logits.argmax(-1))
        scores.append(given)
    policy = cascade.config["policy"]
    return ExitPredictions(
        exit_layers=cascade.exit_layers,
        costs=np.array([stage["cost"] for stage in cascade.config["stages"]]),
        labels=np.concatenate(labels),
        predictions=np.concatenate(predictions),
        scores={} if policy == "patience" else {policy: np.concatenate(scores)},
    )


def recalibrate(directory: Path, config: MEViTConfig, record: ExitPredictions, source: dict[str, Any]) -> Certificate:
    """Chooses the thresholds of an exported cascade anew, for the promise that the model was calibrated for.

    Args:
        directory: of the export; its cascade.json is rewritten.
        config: of the model, calibrated; it is changed.
        record: of the cascade on calibration images.
        source: what describes those images.

    Returns:
        What was found. Where nothing is granted, early exit is off in the export.
    """
    before = config.calibration
    found = calibrate(
        record,
        before["policy"],
        before["promise"],
        per_exit=before.get("per_exit", False),
        num_labels=config.num_labels,
    )
    if found.granted:
        enable_early_exit(config, found.granted, before["promise"], per_exit=before.get("per_exit", False), source=source)
    else:
        disable_early_exit(config)

    file = directory / "cascade.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    description |= {
        "thresholds": config.exit_thresholds,
        "patience": config.patience,
        "early_exit": description["early_exit"] and config.early_exit,
        "calibration": config.calibration,
    }
    file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return found


def accuracies(directory: Path, dataset: Dataset, *, batch_size: int = 32) -> dict[str, float]:
    """Accuracy of each graph that takes an image to its logits: file name → share of images."""
    files = [
        file for file in sorted(directory.glob("*.onnx")) if file.stem == "model" or file.stem.startswith("exit_")
    ]
    sessions = {file.name: onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files}
    right = {name: 0 for name in sessions}
    for batch in tqdm(DataLoader(dataset, batch_size), desc="accuracy", unit="batch"):
        for name, session in sessions.items():
            (logits,) = session.run(["logits"], {"pixel_values": batch["pixel_values"].numpy()})
            right[name] += int((logits.argmax(-1) == batch["labels"].numpy()).sum())
    return {name: count / len(dataset) for name, count in right.items()}


class _Feeds(CalibrationDataReader):
    """Inputs of a graph, one after another, as ONNX Runtime's calibration asks for them."""

    def __init__(self, inputs: Iterator[dict[str, np.ndarray]]):
        self._inputs = inputs

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


class _Recorder:
    """A session that keeps what it is fed."""

    def __init__(self, session: onnxruntime.InferenceSession):
        self.session = session
        self.feeds: list[dict[str, np.ndarray]] = []

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def run(self, names, inputs):
        self.feeds.append(inputs)
        return self.session.run(names, inputs)


def _inputs_of(file: Path, images: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """What a graph of an export is fed while images run through it: itself, or the cascade that it is a part of."""
    if _takes_images(file):
        yield from ({"pixel_values": image} for image in images)
        return
    cascade = Cascade(file.parent)
    stages = cascade.config["stages"]
    place = next(place for place, stage in enumerate(stages) if file.name in (stage["stage"], stage["rows"]))
    pair = list(cascade.stages[place])
    which = 0 if file.name == stages[place]["stage"] else 1
    recorder = pair[which] = _Recorder(pair[which])
    cascade.stages[place] = tuple(pair)
    for image in images:
        cascade.every_exit(image)
        yield from recorder.feeds
        recorder.feeds.clear()


def _takes_images(file: Path) -> bool:
    """Whether a graph goes from images to logits, and is no part of a cascade."""
    return file.stem == "model" or file.stem.startswith("exit_")


def _nodes_in_float(model: onnx.ModelProto) -> list[str]:
    """Heads, and products of two activations: the nodes that are not quantized."""
    weights = {initializer.name for initializer in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTIZED
        and (any(head in node.name for head in HEADS) or not any(name in weights for name in node.input))
    ]
