# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs an exported MEViT cascade. Needs numpy and onnxruntime alone, and Pillow to read image files.

    python cascade_mevit.py DIRECTORY image.jpg …

or, in a program:

    cascade = Cascade("DIRECTORY")
    output = cascade(cascade.preprocess(["image.jpg"]))  # output.logits, output.exit_layer

The directory holds config.json (labels, exit policy and thresholds), preprocessor_config.json, cascade.json (which
lists the graphs), and two graphs for each exit: a stage, from the exit before to the keys and values of this exit's
layer, and a query graph, which computes that layer for [CLS] first, and for the other tokens only where an image goes
on.

A copy of this file lies in every export, to run where the package is not installed. It keeps to Python 3.8, the one of
JetPack 5 (JetPack 6 has 3.10), which the package itself does not support.

B images, E exits, L labels, N tokens of width d, H heads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime


BORDERLINE = 1e-4  # of a score to its threshold: where rounding can decide
CLS, PATCHES = slice(0, 1), slice(1, None)  # tokens


class CascadeOutput(NamedTuple):
    """What a call of [`Cascade`] returns.

    Args:
        logits: (B, L), float32, of the exit that each image took.
        exit_layer: (B,), int64, the layer of that exit.
        borderline: (B,), bool, whether an image had, at an exit that it reached, a score within 1e-4 of its threshold.
            Another runtime may let it leave at another exit.
    """

    logits: np.ndarray
    exit_layer: np.ndarray
    borderline: np.ndarray


class Preprocessing(NamedTuple):
    """What turns an image into pixel values: `resize` and `crop` as (height, width), or None, then the values."""

    resize: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float
    mean: list[float]
    std: list[float]


class Tokens(NamedTuple):
    """What a stage hands on: the exit layer's input (B, N, d), the same normed, keys and values (B, H, N, d/H)."""

    hidden: np.ndarray
    normed: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def select(self, samples: np.ndarray) -> Tokens:
        """Those of some of the samples, by mask."""
        return Tokens(*(array[samples] for array in self))

    def query_inputs(self, tokens: slice) -> dict[str, np.ndarray]:
        """What the query graph is fed, to compute the layer for some of the tokens."""
        return {
            "hidden_queries": np.ascontiguousarray(self.hidden[:, tokens]),
            "normed_queries": np.ascontiguousarray(self.normed[:, tokens]),
            "keys": self.keys,
            "values": self.values,
        }


class Cascade:
    """An exported cascade, whose later stages run only on the images that go on.

    Args:
        directory: of the export.
        providers: ONNX Runtime's execution providers, in order of preference, as names or (name, options); the CPU by
            default.
        threads: of one operator; ONNX Runtime's choice by default.
        config: what config.json holds, which is read by default.

    Raises:
        ValueError: where a file is missing, damaged or of an older version, or a provider is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        providers: str | Sequence[Any] = ("CPUExecutionProvider",),
        threads: int = 0,
        config: dict[str, Any] | None = None,
    ):
        self.directory = Path(directory)
        stages = read_stages(self.directory)
        self.config = _read(self.directory, "config.json") if config is None else config
        size = self.config["image_size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        # a config leaves out what it has by default: two labels of these names
        names = self.config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"})
        self.labels = [names[number] for number in sorted(names, key=int)]
        self.preprocessing = read_preprocessing(_read(self.directory, "preprocessor_config.json"), self.image_size)
        self.exit_layers = [stage["exit_layer"] for stage in stages]

        self._providers = [providers] if isinstance(providers, str) else list(providers)
        installed = onnxruntime.get_available_providers()
        for provider in self._providers:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in installed:
                raise ValueError(f"provider {name} is not installed; these are: {', '.join(installed)}.")
        _share_one_allocator()
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads
        # sessions take turns: waiting ones must neither hold memory of their own nor keep a core busy
        self._options.add_session_config_entry("session.use_env_allocators", "1")
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.stages = [(self.open(stage["stage"]), self.open(stage["query"])) for stage in stages]

    def __call__(
        self,
        pixel_values: np.ndarray,
        early_exit: bool | None = None,
        exit_thresholds: float | Sequence[float] | None = None,
    ) -> CascadeOutput:
        """Classifies images.

        Args:
            pixel_values: (B, C, H, W), float32, as `preprocess` gives them.
            early_exit: whether images leave early; what the config says by default.
            exit_thresholds: one number, or one for each exit but the last; the config's by default.

        Raises:
            ValueError: where images have another shape or type, or thresholds are missing, of the wrong number, NaN,
                or given to a run that does not leave early.
        """
        pixel_values = self._checked(pixel_values)
        thresholds = self._thresholds(early_exit, exit_thresholds)
        logits = np.zeros((len(pixel_values), len(self.labels)), dtype=np.float32)
        exit_layer = np.full(len(pixel_values), self.exit_layers[-1], dtype=np.int64)
        borderline = np.zeros(len(pixel_values), dtype=bool)
        for place, (samples, exit_logits, scores) in enumerate(self._exits(pixel_values, thresholds)):
            # images that go on are written again at their next exit
            logits[samples], exit_layer[samples] = exit_logits, self.exit_layers[place]
            if place < len(thresholds):
                borderline[samples] |= np.abs(scores - thresholds[place]) < BORDERLINE
        return CascadeOutput(logits, exit_layer, borderline)

    def every_exit(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs images (B, C, H, W) to the end: logits (B, E, L) and scores (B, E) of every exit, float32.

        Raises:
            ValueError: where images have another shape or type.
        """
        pixel_values = self._checked(pixel_values)
        exits = list(self._exits(pixel_values, self._thresholds(early_exit=False, given=None)))
        if not exits:  # no images
            shape = (0, len(self.exit_layers))
            return np.zeros((*shape, len(self.labels)), dtype=np.float32), np.zeros(shape, dtype=np.float32)
        _, logits, scores = zip(*exits)  # noqa: B905  Python 3.8 has no strict
        return np.stack(logits, axis=1), np.stack(scores, axis=1)

    def _exits(
        self, pixel_values: np.ndarray, thresholds: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Runs images from exit to exit; those whose score is under the exit's threshold leave the batch there.

        Yields:
            At each exit that is reached: which images reach it (R,), their logits (R, L) and scores (R,).
        """
        state = pixel_values
        samples = np.arange(len(state))  # which images are still in the batch
        labels, streak = np.full(len(state), -1), np.zeros(len(state), dtype=np.int64)
        if not len(samples):
            return
        for place, (stage, query) in enumerate(self.stages):
            tokens = run_stage(stage, state)
            answers = run(query, tokens.query_inputs(CLS))
            predicted = answers["logits"].argmax(-1)
            streak, labels = np.where(predicted == labels, streak + 1, 1), predicted
            # patience is the only policy whose score depends on the exits before, so that no graph computes it
            scores = answers["score"] if "score" in answers else _patience_score(streak, len(self.stages))
            yield samples, answers["logits"], scores
            if place == len(thresholds):
                return

            leaves, cls = scores < thresholds[place], answers["outputs"]
            if leaves.all():
                return
            if leaves.any():
                stays = ~leaves
                samples, labels, streak = samples[stays], labels[stays], streak[stays]
                tokens, cls = tokens.select(stays), cls[stays]
            patches = run(query, tokens.query_inputs(PATCHES))["outputs"]
            state = np.concatenate((cls, patches), axis=1)

    def preprocess(self, images: Sequence[Any]) -> np.ndarray:
        """Reads images (files or PIL images) as the model's image processor does: (B, C, H, W), float32."""
        from PIL import Image, ImageOps

        settings = self.preprocessing
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (settings.mean, settings.std))
        batch = []
        for image in images:
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            image = ImageOps.exif_transpose(image).convert("RGB")
            if settings.resize:
                height, width = settings.resize
                image = image.resize((width, height), resample=settings.resample)
            if settings.crop:
                height, width = settings.crop
                left, top = (image.width - width) // 2, (image.height - height) // 2
                image = image.crop((left, top, left + width, top + height))
            pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) * np.float32(settings.rescale)
            batch.append((pixels - mean) / std)
        return np.stack(batch)

    def open(self, file: str) -> onnxruntime.InferenceSession:
        """A graph of the export, to run with this cascade's providers and threads."""
        try:
            return onnxruntime.InferenceSession(str(self.directory / file), self._options, providers=self._providers)
        except Exception as error:  # ONNX Runtime has an exception class for each of its status codes
            raise ValueError(f"{self.directory / file} is missing or damaged: {error}") from error

    def _checked(self, pixel_values: np.ndarray) -> np.ndarray:
        expected = (self.config["num_channels"], *self.image_size)
        if not isinstance(pixel_values, np.ndarray) or pixel_values.dtype != np.float32:
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ValueError(f"pixel_values must be a numpy array of float32, got {kind}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values must have shape (B, {', '.join(map(str, expected))}), got {pixel_values.shape}."
            )
        return pixel_values

    def _thresholds(self, early_exit: bool | None, given: float | Sequence[float] | None) -> np.ndarray:
        """(E − 1,), float32: the thresholds of the early exits; below all scores where no image leaves early."""
        num_early = len(self.exit_layers) - 1
        if early_exit is None:
            early_exit = self.config["early_exit"]
        if not early_exit:
            if given is not None:
                raise ValueError("exit_thresholds need early_exit=True; without it no image leaves early.")
            return np.full(num_early, -np.inf, dtype=np.float32)
        given = self.config["exit_thresholds"] if given is None else given
        if given is None:
            raise ValueError("early exit needs exit_thresholds; neither the call nor the export has any.")
        thresholds = np.asarray(given, dtype=np.float32)
        if thresholds.shape not in ((), (num_early,)):
            raise ValueError(f"exit_thresholds must be one number or {num_early}, got {given}.")
        if np.isnan(thresholds).any():
            raise ValueError(f"exit_thresholds must be numbers, got {given}.")
        return np.broadcast_to(thresholds, num_early)


def read_stages(directory: Path) -> list[dict[str, Any]]:
    """The graphs of an exported cascade: `exit_layer`, the files `stage` and `query`, and the `cost` of leaving there.

    Raises:
        ValueError: where cascade.json is missing, or of an older version.
    """
    description = _read(directory, "cascade.json")
    stages: list[dict[str, Any]] = description["stages"]
    if "thresholds" in description or any("query" not in stage for stage in stages):
        raise ValueError(
            f"{directory} was exported by an older version; export the checkpoint again with `mevit export`."
        )
    return stages


def read_preprocessing(config: dict[str, Any], image_size: tuple[int, ...]) -> Preprocessing:
    """What an image processor does, from its preprocessor_config.json.

    Args:
        config: what that file holds.
        image_size: height and width that the model needs.

    Raises:
        ValueError: where it resizes or crops otherwise than to a height and width, or its images are of another size.
    """

    def height_and_width(name: str) -> tuple[int, int]:
        given = config[name]
        if set(given) != {"height", "width"}:
            raise ValueError(f"the image processor's {name} must be height and width, got {given}.")
        return given["height"], given["width"]

    resize = height_and_width("size") if config.get("do_resize") else None
    crop = height_and_width("crop_size") if config.get("do_center_crop") else None
    if (crop or resize) != image_size:
        raise ValueError(
            f"the image processor must make images of {image_size}, which the model needs, got {crop or resize}."
        )
    channels = 3
    normalizes = config.get("do_normalize")
    return Preprocessing(
        resize=resize,
        resample=int(config["resample"]),
        crop=crop,
        rescale=config["rescale_factor"] if config.get("do_rescale") else 1.0,
        mean=list(config["image_mean"]) if normalizes else [0.0] * channels,
        std=list(config["image_std"]) if normalizes else [1.0] * channels,
    )


def run(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a graph: output name → value."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))  # noqa: B905  Python 3.8 has no strict


def stage_inputs(session: onnxruntime.InferenceSession, state: np.ndarray) -> dict[str, np.ndarray]:
    """What a stage is fed: pixel values (B, C, H, W) if it is the first, else tokens (B, N, d) of the exit before."""
    return {session.get_inputs()[0].name: state}


def run_stage(session: onnxruntime.InferenceSession, state: np.ndarray) -> Tokens:
    """Runs a stage up to its exit's layer."""
    outputs = run(session, stage_inputs(session, state))
    # between neighbouring exits there is no layer, and the stage does not repeat its input
    return Tokens(outputs.get("hidden_state", state), outputs["normed"], outputs["keys"], outputs["values"])


def _patience_score(streak: np.ndarray, num_exits: int) -> np.ndarray:
    """1 − streak / E, float32, of how many exits in a row predict the same label."""
    return np.float32(1) - streak.astype(np.float32) / np.float32(num_exits)


def _read(directory: Path, name: str) -> dict[str, Any]:
    file = directory / name
    if not file.is_file():
        raise ValueError(f"{directory} is not a finished export of a cascade; it has no {name}.")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


_allocator_is_shared = False


def _share_one_allocator() -> None:
    """One CPU memory arena for all sessions of the process, where each would keep its own."""
    global _allocator_is_shared
    if _allocator_is_shared:
        return
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        onnxruntime.create_and_register_allocator(memory, None)
    except RuntimeError as error:
        if "already" not in str(error):
            raise
    _allocator_is_shared = True


def main(arguments: list[str]) -> None:
    """Prints label, probability and exit layer of each image file."""
    if len(arguments) < 2:
        sys.exit("usage: python cascade_mevit.py DIRECTORY image.jpg …")
    directory, *files = arguments
    try:
        cascade = Cascade(directory)
        for file in files:
            output = cascade(cascade.preprocess([file]))
            probabilities = np.exp(output.logits[0] - output.logits[0].max())
            probabilities /= probabilities.sum()
            label = int(probabilities.argmax())
            print(f"{file}\t{cascade.labels[label]}\t{probabilities[label]:.3f}\texit {output.exit_layer[0]}")
    except (ValueError, OSError) as error:  # OSError also of a file that is not an image
        sys.exit(f"cascade_mevit.py: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
