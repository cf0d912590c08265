# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs an exported MEViT cascade. Needs numpy and onnxruntime alone, and Pillow to read image files.

    python cascade_mevit.py DIRECTORY image.jpg …

or, in a program:

    cascade = Cascade("DIRECTORY")
    logits, exit_layer = cascade(cascade.preprocess(["image.jpg"]))

The directory holds cascade.json, which describes everything, and two graphs for each exit: a stage, from the exit
before to the keys and values of this exit's layer, and its rows, which finish that layer for [CLS] first, and for the
other tokens only where an image goes on.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


BORDERLINE = 1e-4  # of a score to its threshold: where rounding can decide


class Cascade:
    """An exported cascade, whose later stages run on the images that go on alone.

    Args:
        directory: of the export.
        providers: ONNX Runtime's execution providers, in order of preference, as names or (name, options); the CPU by
            default.
        threads: of one operator; ONNX Runtime's choice by default.

    Attributes:
        borderline: how many of the images that ran so far had, at an exit that they reached, a score within 1e-4 of
            its threshold. Another runtime may let these leave at another exit.

    Raises:
        ValueError: where a file is missing or cannot be read, or a provider is not installed.
    """

    def __init__(self, directory, providers=("CPUExecutionProvider",), threads=0):
        directory = Path(directory)
        description = directory / "cascade.json"
        if not description.is_file():
            raise ValueError(f"{directory} is no exported cascade; it has no cascade.json.")
        self.config = json.loads(description.read_text(encoding="utf-8"))
        providers = [providers] if isinstance(providers, str) else list(providers)
        installed = onnxruntime.get_available_providers()
        for provider in providers:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in installed:
                raise ValueError(f"provider {name} is not installed; these are: {', '.join(installed)}.")

        _share_one_allocator()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # sessions take turns: waiting ones must neither hold memory of their own nor keep a core busy
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def session(file):
            try:
                return onnxruntime.InferenceSession(str(directory / file), options, providers=providers)
            except Exception as error:  # ONNX Runtime has an exception class for each of its status codes
                raise ValueError(f"{directory / file} is missing or damaged: {error}") from error

        self.stages = [(session(stage["stage"]), session(stage["rows"])) for stage in self.config["stages"]]
        self.exit_layers = [stage["exit_layer"] for stage in self.config["stages"]]
        self.borderline = 0

    def __call__(self, pixel_values, early_exit=None, exit_thresholds=None):
        """Classifies images.

        Args:
            pixel_values: (B, C, H, W), float32, as `preprocess` gives them.
            early_exit: whether images leave early; what cascade.json says by default.
            exit_thresholds: one number, or one for each exit but the last; the export's by default.

        Returns:
            logits (B, L), float32, of the exit that each image took, and exit_layer (B,), int64.

        Raises:
            ValueError: where images have another shape or type, or thresholds are missing, of the wrong number, NaN,
                or given to a run that does not leave early.
        """
        pixel_values = self._checked(pixel_values)
        thresholds = self._thresholds(early_exit, exit_thresholds)
        last = len(self.stages) - 1
        labels_so_far = []  # of all images, for patience
        logits_of_all = np.zeros((len(pixel_values), len(self.config["labels"])), dtype=np.float32)
        exit_layer = np.full(len(pixel_values), self.exit_layers[-1], dtype=np.int64)
        is_borderline = np.zeros(len(pixel_values), dtype=bool)

        def leaves(place, samples, answers):
            logits = answers["logits"]
            if place == last or thresholds is None:
                mask = np.full(len(samples), place == last)
            elif self.config["policy"] == "patience":
                labels = np.full(len(pixel_values), -1)
                labels[samples] = logits.argmax(-1)
                labels_so_far.append(labels)
                recent = labels_so_far[-self.config["patience"] :]
                agree = np.all([earlier[samples] == labels[samples] for earlier in recent], axis=0)
                mask = agree & (len(recent) == self.config["patience"])
            else:
                mask = answers["score"] < np.float32(thresholds[place])
                is_borderline[samples] |= np.abs(answers["score"] - thresholds[place]) < BORDERLINE
            logits_of_all[samples[mask]] = logits[mask]
            exit_layer[samples[mask]] = self.exit_layers[place]
            return mask

        self._walk(pixel_values, leaves)
        self.borderline += int(is_borderline.sum())
        return logits_of_all, exit_layer

    def every_exit(self, pixel_values):
        """Runs images (B, C, H, W) to the end: logits (B, E, L) of every exit, and scores (B, E), or None.

        Raises:
            ValueError: where images have another shape or type.
        """
        pixel_values = self._checked(pixel_values)
        has_scores = self.config["policy"] != "patience"
        if not len(pixel_values):
            exits = len(self.stages)
            logits = np.zeros((0, exits, len(self.config["labels"])), dtype=np.float32)
            return logits, np.zeros((0, exits), dtype=np.float32) if has_scores else None
        given = []

        def leaves(place, samples, answers):
            given.append(answers)
            return np.zeros(len(samples), dtype=bool)

        self._walk(pixel_values, leaves)
        logits = np.stack([answers["logits"] for answers in given], axis=1)
        return logits, np.stack([answers["score"] for answers in given], axis=1) if has_scores else None

    def _walk(self, pixel_values, leaves):
        """Takes images from stage to stage. `leaves(place, samples, answers)` says which of them leave there."""
        state = pixel_values
        samples = np.arange(len(state))  # which images are still in the batch
        for place, (stage, rows) in enumerate(self.stages):
            if not len(samples):
                return
            outputs = _run(stage, {stage.get_inputs()[0].name: state})
            state = outputs.get("hidden_state", state)
            normed, keys, values = outputs["normed"], outputs["keys"], outputs["values"]
            answers = _run_rows(rows, state[:, :1], normed[:, :1], keys, values)
            stays = ~leaves(place, samples, answers)
            if place == len(self.stages) - 1 or not stays.any():
                return
            cls_row = answers["rows"]
            if not stays.all():
                samples, cls_row = samples[stays], cls_row[stays]
                state, normed, keys, values = state[stays], normed[stays], keys[stays], values[stays]
            patch_rows = _run_rows(rows, state[:, 1:], normed[:, 1:], keys, values)["rows"]
            state = np.concatenate((cls_row, patch_rows), axis=1)

    def preprocess(self, images):
        """Reads images (files or PIL images) as the model's image processor does: (B, C, H, W), float32."""
        from PIL import Image, ImageOps

        settings = self.config["preprocessing"]
        mean, std = (np.array(settings[name], dtype=np.float32)[:, None, None] for name in ("mean", "std"))
        batch = []
        for image in images:
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            image = ImageOps.exif_transpose(image).convert("RGB")
            if settings["resize"]:
                height, width = settings["resize"]
                image = image.resize((width, height), resample=settings["resample"])
            if settings["crop"]:
                height, width = settings["crop"]
                left, top = (image.width - width) // 2, (image.height - height) // 2
                image = image.crop((left, top, left + width, top + height))
            pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) * np.float32(settings["rescale"])
            batch.append((pixels - mean) / std)
        return np.stack(batch)

    def _checked(self, pixel_values):
        expected = (self.config["channels"], *self.config["image_size"])
        if not isinstance(pixel_values, np.ndarray) or pixel_values.dtype != np.float32:
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ValueError(f"pixel_values are {kind}; allowed is a numpy array of float32.")
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values have shape {pixel_values.shape}; allowed is (B, {', '.join(map(str, expected))})."
            )
        return pixel_values

    def _thresholds(self, early_exit, given):
        """The thresholds of an early-exit run, [] for patience, None for a run to the end."""
        calibrated = self.config["thresholds"]
        is_patience = self.config["policy"] == "patience"
        if early_exit is None:
            early_exit = self.config["early_exit"]
        if not early_exit:
            if given is not None:
                raise ValueError("exit_thresholds are for early_exit=True; without it no image leaves early.")
            return None
        if is_patience:
            if given is not None:
                raise ValueError("exit_thresholds have no meaning under the policy 'patience'.")
            return []
        given = calibrated if given is None else given
        if given is None:
            raise ValueError("early exit needs exit_thresholds; neither the call nor the export has any.")
        early = len(self.stages) - 1
        thresholds = [float(given)] * early if np.isscalar(given) else [float(one) for one in given]
        if len(thresholds) != early:
            raise ValueError(f"{len(thresholds)} exit_thresholds do not fit {early} early exits.")
        if any(np.isnan(thresholds)):
            raise ValueError(f"exit_thresholds={thresholds} hold NaN, which no score is under.")
        return thresholds


def _run(session, inputs):
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, inputs)
    return {name: values[place] for place, name in enumerate(names)}


def _run_rows(session, hidden_rows, normed_rows, keys, values):
    rows = {"hidden_rows": np.ascontiguousarray(hidden_rows), "normed_rows": np.ascontiguousarray(normed_rows)}
    return _run(session, {**rows, "keys": keys, "values": values})


_allocator_is_shared = False


def _share_one_allocator():
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


def main(arguments):
    """Prints label, probability and exit layer of each image file."""
    if len(arguments) < 2:
        sys.exit("usage: python cascade_mevit.py DIRECTORY image.jpg …")
    directory, *files = arguments
    try:
        cascade = Cascade(directory)
    except ValueError as error:
        sys.exit(f"cascade_mevit.py: error: {error}")
    for file in files:
        try:
            pixel_values = cascade.preprocess([file])
        except OSError as error:  # also of a file that is no image
            sys.exit(f"cascade_mevit.py: error: {error}")
        logits, exit_layer = cascade(pixel_values)
        probabilities = np.exp(logits[0] - logits[0].max())
        probabilities /= probabilities.sum()
        label = int(probabilities.argmax())
        print(f"{file}\t{cascade.config['labels'][label]}\t{probabilities[label]:.3f}\texit {exit_layer[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
