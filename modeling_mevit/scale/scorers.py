# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What scores images: the cascade of an export, or the PyTorch model of a checkpoint, behind one interface."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .._extras import extras_named
from ..early_exit.monitoring import PromiseMonitor
from ..hub import is_export, locate


if TYPE_CHECKING:
    from ..configuration_mevit import MEViTConfig

NOT_A_NUMBER = "the model's result is not a number"


class NamedContent(io.BytesIO):
    """What an image file holds, under a name for error messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Scores(NamedTuple):
    """What a model says of B images.

    Args:
        labels: B names of classes, or None where the result is not a number.
        probability: (B,), float32, of the label.
        exit_layer: (B,), int64.
        exit_score: (B,), float32.
        full_labels: B names of classes, that the full run gives; None of those that were not audited.
    """

    labels: list[str | None]
    probability: np.ndarray
    exit_layer: np.ndarray
    exit_score: np.ndarray
    full_labels: list[str | None]


class Scorer(Protocol):
    """A model that reads image files and scores them, with early exit where its config says so."""

    def read(self, content: NamedContent) -> np.ndarray:
        """An image file → pixel values (C, H, W), float32; raises a `ValueError` where it cannot be read."""

    def __call__(self, pixel_values: np.ndarray, monitor: PromiseMonitor | None = None) -> Scores:
        """Scores images (B, C, H, W). Those that a monitor draws also run to the end, and it counts them."""


def open_scorer(checkpoint: str, threads: int = 1, on_gpu: bool = False) -> Scorer:
    """The scorer of a checkpoint or of an export, whose files are not run.

    Raises:
        MissingExtraError: where what runs it is not installed.
        ValueError: where it cannot be loaded.
    """
    with extras_named(checkpoint):
        return (CascadeScorer if is_export(checkpoint) else CheckpointScorer)(checkpoint, threads, on_gpu)


class CascadeScorer:
    """The cascade of an export. It needs no torch, so that a process with it is small and starts quickly."""

    def __init__(self, directory: str, threads: int = 1, on_gpu: bool = False):
        from ..onnx.cascade_mevit import Cascade, default_backend, read_description

        made_for = read_description(Path(directory)).get("precision", "float32")
        if on_gpu and default_backend(made_for) != "onnxruntime":
            raise ValueError(
                f"--gpus must be 0 for an export made for {made_for}, which runs on the CPU, {directory}."
            )
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider") if on_gpu else None
        self.cascade = Cascade(directory, providers, threads)

    def read(self, content: NamedContent) -> np.ndarray:
        return self.cascade.preprocess([content])[0]

    def __call__(self, pixel_values: np.ndarray, monitor: PromiseMonitor | None = None) -> Scores:
        self.cascade.monitor = monitor
        output = self.cascade(pixel_values)
        return scores_of(output.logits, output.exit_layer, output.exit_score, self.cascade.labels, monitor)


class CheckpointScorer:
    """The PyTorch model of a checkpoint."""

    def __init__(self, checkpoint: str, threads: int = 1, on_gpu: bool = False):
        import torch

        from ..checkpoint import load_image_processor, load_model
        from ..data.image_processing import evaluation_transform

        torch.set_num_threads(threads)
        self.model = load_model(checkpoint, "cuda" if on_gpu else "cpu")
        self.transform = evaluation_transform(load_image_processor(checkpoint))
        id2label = self.model.config.id2label
        self.labels = [id2label[number] for number in range(len(id2label))]

    def read(self, content: NamedContent) -> np.ndarray:
        from ..data.image_processing import read_image

        return self.transform(read_image(content)).numpy()

    def __call__(self, pixel_values: np.ndarray, monitor: PromiseMonitor | None = None) -> Scores:
        import torch

        with torch.inference_mode():
            images = torch.from_numpy(pixel_values).to(self.model.device)
            output: Any = self.model(images) if monitor is None else monitor.run(self.model, images)
        layers, scores = output.exit_layer, output.exit_score
        if layers is None:  # early exit is off
            layers = torch.full((len(pixel_values),), self.model.config.exit_layers[-1])
            scores = output.exit_scores[:, -1]
        arrays = (one.float().cpu().numpy() for one in (output.logits, scores))
        logits, exit_score = arrays
        return scores_of(logits, layers.cpu().numpy(), exit_score, self.labels, monitor)


def scores_of(
    logits: np.ndarray,
    exit_layer: np.ndarray,
    exit_score: np.ndarray,
    labels: Sequence[str],
    monitor: PromiseMonitor | None = None,
) -> Scores:
    """Labels and probabilities of logits (B, L), by the names of the labels, beside exits (B,), scores (B,), and what
    a monitor has just learned of the full run."""
    full_labels: list[str | None] = [None] * len(logits)
    if monitor is not None:
        for image, label in zip(monitor.last_audit.images, monitor.last_audit.full, strict=True):
            full_labels[image] = labels[label] if label >= 0 else None
    finite = np.isfinite(logits).all(-1)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True), where=finite[:, None], out=np.ones_like(logits))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    numbers = probabilities.argmax(-1)
    return Scores(
        labels=[labels[number] if good else None for number, good in zip(numbers, finite, strict=True)],
        probability=probabilities.max(-1),
        exit_layer=exit_layer,
        exit_score=exit_score,
        full_labels=full_labels,
    )


def promise_monitor(
    checkpoint: str, audit: float, max_disagreement: float | None = None, seed: int | None = None
) -> PromiseMonitor:
    """What watches the promise of a checkpoint or of an export.

    Args:
        checkpoint: its name.
        audit: share of the images that also run to the end.
        max_disagreement: share that may disagree; what calibration promised by default.
        seed: of the draw of audited images; by default one from the operating system.

    Raises:
        ValueError: where early exit is off, nothing was promised and no share is given, or a number is out of range.
    """
    from ..onnx.cascade_mevit import calibrated_precision, read_json

    if is_export(checkpoint):
        content = read_json(Path(checkpoint), "config.json")
    else:
        content = checkpoint_config(checkpoint).to_dict()
    if content.get("early_exit") is not True:
        raise ValueError(
            f"--audit compares early exit with the full run, and must be left out where early exit is off, as it is "
            f"in {checkpoint}."
        )
    if max_disagreement is not None:
        return PromiseMonitor(max_disagreement, audit=audit, seed=seed)
    calibration = content.get("calibration")
    try:
        monitor = PromiseMonitor.from_calibration(calibration, audit=audit, seed=seed)
        if calibrated_precision(content, "float32") is None:
            raise ValueError("its thresholds are not those that were calibrated.")
        return monitor
    except ValueError as error:
        raise ValueError(f"--audit needs a promise in {checkpoint}, or --max-disagreement: {error}") from error


def exit_costs(checkpoint: str) -> dict[int, float]:
    """Exit layer → cost of an image that leaves there, relative to the plain ViT."""
    if is_export(checkpoint):
        from ..onnx.cascade_mevit import read_stages

        return {stage["exit_layer"]: stage["cost"] for stage in read_stages(Path(checkpoint))}
    from ..early_exit.cost import dynamic_exit_costs

    return dynamic_exit_costs(checkpoint_config(checkpoint))


def checkpoint_config(checkpoint: str) -> "MEViTConfig":
    """The config of a checkpoint, by which a wrong one is known before any process starts.

    Raises:
        ValueError: where it has none, or holds another kind of model.
    """
    from transformers import AutoConfig

    from ..configuration_mevit import MEViTConfig

    if Path(checkpoint).is_dir() and not Path(checkpoint, "config.json").is_file():
        raise ValueError(f"{checkpoint} must hold a MEViT checkpoint or an export; it has no config.json.")
    config = AutoConfig.from_pretrained(locate(checkpoint), trust_remote_code=False)
    if not isinstance(config, MEViTConfig):
        raise ValueError(f"{checkpoint} must hold a MEViT checkpoint or an export; it holds a {config.model_type}.")
    return config


def model_digest(checkpoint: str) -> str:
    """Digest of all that decides what a checkpoint or an export says of images; of a Hub name, its revision."""
    if not Path(checkpoint).is_dir():
        config = checkpoint_config(checkpoint)
        return hashlib.sha256(f"{checkpoint} {config._commit_hash}".encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    kinds = ("*.onnx",) if is_export(checkpoint) else ("*.safetensors",)
    settings = ("config.json", "preprocessor_config.json", "cascade.json")
    for kind in (*settings, *kinds):
        for file in sorted(Path(checkpoint).glob(kind)):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()[:16]


def absolute(checkpoint: str) -> str:
    """A local directory by its whole path, so that processes elsewhere find it; a Hub name as it is."""
    return os.path.abspath(checkpoint) if Path(checkpoint).is_dir() else checkpoint
