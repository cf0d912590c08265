# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs an exported MEViT cascade. Needs numpy and onnxruntime (or openvino) alone, and Pillow to read image files.
With neither it runs where something else runs the graphs, as Triton does.

    python cascade_mevit.py DIRECTORY image.jpg …

or, in a program:

    cascade = Cascade("DIRECTORY")
    output = cascade(cascade.preprocess(["image.jpg"]))  # output.logits, output.exit_layer

The directory holds config.json (labels, exit policy and thresholds), preprocessor_config.json, cascade.json (which
lists the graphs), and two graphs for each exit: a stage, from the exit before to the keys and values of this exit's
layer, and a query graph, which computes that layer for [CLS] first, and for the other tokens only where an image goes
on. Where exits are combined, query graphs also take and give the sum of the log-probabilities of the exits passed. An
export is data from anyone: what these files say is checked before anything of that size is made, and files lie in the
directory itself. One that is not finished has no cascade.json, which is written last.

A copy of this file lies in every export, to run where the package is not installed. It keeps to Python 3.8, the one of
JetPack 5 (JetPack 6 has 3.10), which the package itself does not support.

B images, E exits, L labels, N tokens of width d, H heads.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np


if TYPE_CHECKING:
    import onnxruntime

BACKENDS = ("onnxruntime", "openvino")
INFERENCE_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # ours, and OpenVINO's name for it
CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}  # its names of what a processor can do
FILES = ("float32", "float16", "int8", "int8-dynamic")  # what graphs are written in

BORDERLINE = 1e-4  # of a score to its threshold: where rounding can decide
CLS, PATCHES, TOKENS = slice(0, 1), slice(1, None), slice(None)  # tokens: the first, the others, all

PLAIN_NAME = re.compile(r"\w[\w.-]*")
MAX_EXITS = 1000
MAX_LAYER = 10_000
MAX_SIDE = 4096  # of an image that is resized or cropped, in pixels
MAX_JSON = 2**26  # bytes
READ_AT_ONCE = 2**20  # bytes
EXTERNAL_WEIGHTS = b"location"  # a key in ONNX files, and nowhere else in those that are exported
RESAMPLING = range(6)  # Pillow's filters
CHANNELS = 3  # of an image that is read: red, green, blue
LARGEST = float(np.finfo(np.float32).max)


class CascadeOutput(NamedTuple):
    """What a call of [`Cascade`] returns.

    Args:
        logits: (B, L), float32, of the exit that each image took.
        exit_layer: (B,), int64, the layer of that exit.
        exit_score: (B,), float32, its score, low where the exit is sure.
        borderline: (B,), bool, whether an image had, at an exit that it reached, a score within 1e-4 of its threshold.
            Another runtime may let it leave at another exit.
    """

    logits: np.ndarray
    exit_layer: np.ndarray
    exit_score: np.ndarray
    borderline: np.ndarray


class CascadeState(NamedTuple):
    """Images on their way through a cascade: what the stages that follow need of them.

    Args:
        hidden: (B, C, H, W), pixel values before the first stage; then (B, N, d), tokens that the exit before gave.
        labels: (B,), int64, that the exit before predicts; -1 where it predicts none.
        streak: (B,), int64, how many exits in a row predict that label.
        log_probabilities: (B, L), float32, summed over the exits passed, where exits are combined.
        audited: (B,), bool, which images run to the end, also where they have left.
        left: (B,), bool, which of them have left, so that they have their answer.
    """

    hidden: np.ndarray
    labels: np.ndarray
    streak: np.ndarray
    log_probabilities: np.ndarray
    audited: np.ndarray
    left: np.ndarray

    def select(self, samples: np.ndarray) -> CascadeState:
        """That of some of the images, by mask or index."""
        return CascadeState(*(array[samples] for array in self))


class ExitAnswer(NamedTuple):
    """What one exit says of the images that reach it.

    Args:
        logits: (B, L), float32, that it predicts with.
        exit_logits: (B, L), float32, its own; others only where exits are combined.
        scores: (B,), float32.
        leaves: (B,), bool, which images leave there, and did not before.
    """

    logits: np.ndarray
    exit_logits: np.ndarray
    scores: np.ndarray
    leaves: np.ndarray


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


class Monitor(Protocol):
    """What watches a cascade: the `PromiseMonitor` of monitoring_mevit.py, which lies beside this file."""

    def draw(self, count: int) -> np.ndarray:
        """(count,), bool: which of the next images also run to the end."""
        ...

    def update(self, early: np.ndarray, full: np.ndarray) -> None:
        """Counts those, by the labels (A,) of the exits that they took, and of the full run."""
        ...


class RunnableGraph:
    """A graph of an export, in a runtime. Called with inputs by name, it returns outputs by name.

    `inputs` and `outputs` hold the sizes of each, by name, where dimensions that may vary are names or None.
    """

    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def precision_of(self, files: str) -> str:
        """What it computes in, where its file is one of `FILES`."""
        return files


class OnnxRuntimeGraph(RunnableGraph):
    """A graph that ONNX Runtime runs.

    Args:
        file: of the graph.
        options: of the session, ONNX Runtime's own by default.
        providers: ONNX Runtime's execution providers, in order of preference.
    """

    def __init__(
        self,
        file: str | Path,
        options: onnxruntime.SessionOptions | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
    ):
        import onnxruntime  # here, since not every machine has it that runs a cascade

        with large_blocks_apart():
            self.session = onnxruntime.InferenceSession(str(file), options, providers=list(providers))
        self.inputs, self.outputs = (
            {one.name: one.shape for one in ports} for ports in (self.session.get_inputs(), self.session.get_outputs())
        )

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = list(self.outputs)
        return dict(zip(names, self.session.run(names, inputs)))  # noqa: B905  Python 3.8 has no strict

    def precision_of(self, files: str) -> str:
        # others round products as they like: TensorRT by its options, CUDA to TF32
        provider = self.session.get_providers()[0]
        return files if provider == "CPUExecutionProvider" else f"{files} by {provider}"


class OpenVINOGraph(RunnableGraph):
    """A graph that OpenVINO runs on the CPU.

    Args:
        file: of the graph.
        precision: to compute in, one of `INFERENCE_PRECISIONS`; by default what OpenVINO takes on this processor.
        threads: OpenVINO's choice by default.

    Raises:
        ValueError: where the precision is unknown, or the processor does not compute in it.
    """

    def __init__(self, file: str | Path, precision: str | None = None, threads: int = 0):
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}  # one call at a time
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
            # else those of every process, as replicas on one machine are, keep to the same first cores
            settings["ENABLE_CPU_PINNING"] = False
        if precision is not None:
            names = ", ".join(map(repr, INFERENCE_PRECISIONS))
            _must("precision", precision in INFERENCE_PRECISIONS, f"one of {names}", precision)
            settings["INFERENCE_PRECISION_HINT"] = INFERENCE_PRECISIONS[precision]
        core = openvino_core()
        able = openvino_precisions()
        if precision is not None:
            names = ", ".join(map(repr, able))
            _must("precision", precision in able, f"one of {names}, which this processor has", precision)
        self.compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
        taken = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.precision = {theirs: ours for ours, theirs in INFERENCE_PRECISIONS.items()}[taken]
        self.inputs, self.outputs = (
            {port.get_any_name(): _sizes(port) for port in ports}
            for ports in (self.compiled.inputs, self.compiled.outputs)
        )
        self._requests = threading.local()  # which hold the memory of one run

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self.compiled.create_infer_request()
        answers = request.infer(inputs, share_inputs=True)
        return {name: answers[name] for name in self.outputs}

    def precision_of(self, files: str) -> str:
        return self.precision if files == "float32" else f"{files} by OpenVINO in {self.precision}"


class Cascade:
    """An exported cascade, whose later stages run only on the images that go on.

    Args:
        directory: of the export.
        providers: ONNX Runtime's execution providers, in order of preference, as names or (name, options); the CPU by
            default.
        threads: of one operator; the runtime's choice by default.
        config: what config.json holds, which is read by default.
        description: what cascade.json holds, which is read by default; an export that is not finished has none.
        options: of ONNX Runtime's sessions, its own by default; those for sessions that take turns are added.
        places: of the exits whose stages are opened, from 0 to E - 1, one after the other; all by default. With some,
            only `advance` runs.
        monitor: of the promise: the images that it draws also run to the end, on from where they left, in every call
            with early exit. Answers do not depend on it.
        backend: what runs the graphs, one of `BACKENDS`. By default ONNX Runtime, and OpenVINO where the export was
            made for bfloat16, in which ONNX Runtime does not compute.
        precision: that OpenVINO computes in, one of `INFERENCE_PRECISIONS`. By default the one that the export was
            made for if that is bfloat16, else what OpenVINO takes on this processor: bfloat16 where it has
            instructions for it, float16 on ARM.
        graphs: opens a graph by the name of its file, where something else than these backends runs it.

    Raises:
        ImportError: where the backend is not installed.
        ValueError: where a file is missing, malformed, damaged, of an older version or outside the directory, a
            provider is not installed, or an argument is not one of those above or belongs to the other backend.

    Warns:
        UserWarning: where the thresholds were chosen in another precision than the graphs are run in.
    """

    def __init__(
        self,
        directory: str | Path,
        providers: str | Sequence[Any] | None = None,
        threads: int = 0,
        config: dict[str, Any] | None = None,
        description: dict[str, Any] | None = None,
        options: onnxruntime.SessionOptions | None = None,
        places: range | None = None,
        monitor: Monitor | None = None,
        backend: str | None = None,
        precision: str | None = None,
        graphs: Callable[[str], RunnableGraph] | None = None,
    ):
        self.directory = Path(directory)
        self.monitor = monitor
        description = read_description(self.directory) if description is None else description
        stages: list[dict[str, Any]] = description["stages"]
        self.made_for: str = description.get("precision", "float32")
        self.config = read_json(self.directory, "config.json") if config is None else config
        check_config(self.config, stages)
        size = self.config["image_size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.labels = read_labels(self.config)
        self.preprocessing = read_preprocessing(read_json(self.directory, "preprocessor_config.json"), self.image_size)
        self.exit_layers = [stage["exit_layer"] for stage in stages]

        if graphs is None:
            self.backend: str | None = default_backend(self.made_for) if backend is None else backend
            self.open = self._opener(providers, threads, options, precision)
        elif any(given not in (None, 0) for given in (backend, precision, providers, options, threads)):
            raise ValueError(
                "backend, precision, providers, options and threads must be left out with graphs, which something "
                "else runs."
            )
        else:
            self.backend, self.open = None, graphs
        self.places = range(len(stages)) if places is None else places
        if not self.places or self.places != range(len(stages))[self.places.start : self.places.stop]:
            raise ValueError(f"places must be some of {range(len(stages))} in a row, got {places}.")
        opened = [stages[place] for place in self.places]
        self.stages = [(self.open(stage["stage"]), self.open(stage["query"])) for stage in opened]
        self._check_graphs()
        files = self.made_for if self.made_for in FILES else "float32"
        self.precision = self.stages[0][0].precision_of(files)
        expected = calibrated_precision(self.config, self.made_for)
        if expected not in (None, self.precision):
            warnings.warn(
                f"the thresholds of {self.directory} were chosen in {expected}, got {self.precision}, where scores "
                f"differ, so that nothing is promised about early exit here.",
                stacklevel=2,
            )

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
        self._must_be_whole()
        monitor = self.monitor if self._is_early(early_exit) else None
        pixel_values = self._checked(pixel_values)
        audited = None if monitor is None else monitor.draw(len(pixel_values))
        output, at_the_end, state = self.advance(self.start(pixel_values, audited), early_exit, exit_thresholds)
        if monitor is not None and len(at_the_end):
            monitor.update(early=labels_of(output.logits[at_the_end]), full=state.labels)
        return output

    def start(self, pixel_values: np.ndarray, audited: np.ndarray | None = None) -> CascadeState:
        """Images (B, C, H, W) before the first stage, to be run by `advance`.

        Args:
            pixel_values: of the images.
            audited: (B,), bool, which of them run to the end whatever the exits say; none by default.

        Raises:
            ValueError: where images have another shape or type.
        """
        pixel_values = self._checked(pixel_values)
        count = len(pixel_values)
        nobody = np.zeros(count, dtype=bool)
        return CascadeState(
            hidden=pixel_values,
            labels=np.full(count, -1),
            streak=np.zeros(count, dtype=np.int64),
            log_probabilities=np.zeros((count, len(self.labels)), dtype=np.float32),
            audited=nobody if audited is None else audited,
            left=nobody,
        )

    def advance(
        self,
        state: CascadeState,
        early_exit: bool | None = None,
        exit_thresholds: float | Sequence[float] | None = None,
    ) -> tuple[CascadeOutput, np.ndarray, CascadeState]:
        """Runs images through the stages that were opened. Those that leave early leave the batch at their exit.

        So a cascade can be cut at any exit, its parts run in processes of their own, and only states go between them.

        Args:
            state: of B images, that `start` or the part before gave.
            early_exit: whether images leave early; what the config says by default.
            exit_thresholds: one number, or one for each exit but the last of the whole cascade; the config's by
                default.

        Returns:
            What the exits say of all B images, where `logits`, `exit_layer` and `exit_score` are of those that left
            now, and 0 of the others; which images go on, (R,), int64; and their state, for the part that follows.
            Audited images go on from every exit, so that at the end the state has theirs, whose `labels` are those of
            the full run.

        Raises:
            ValueError: where thresholds are missing, of the wrong number, NaN, or given to a run that does not leave
                early.
        """
        thresholds = self._thresholds(early_exit, exit_thresholds)
        counts, count = self._counts(thresholds), len(state.hidden)
        output = CascadeOutput(
            logits=np.zeros((count, len(self.labels)), dtype=np.float32),
            exit_layer=np.zeros(count, dtype=np.int64),
            exit_score=np.zeros(count, dtype=np.float32),
            borderline=np.zeros(count, dtype=bool),
        )
        samples = np.arange(count)  # which images are still in the batch
        for place in self.places:
            if not len(samples):
                break
            if not counts[place]:
                state = self._skip_exit(place, state)
                continue
            answer, rest = self._run_exit(place, state, thresholds)
            left = samples[answer.leaves]
            output.logits[left], output.exit_score[left] = answer.logits[answer.leaves], answer.scores[answer.leaves]
            output.exit_layer[left] = self.exit_layers[place]
            if place < len(thresholds):
                is_near = np.abs(answer.scores - thresholds[place]) < BORDERLINE
                output.borderline[samples] |= is_near & ~state.left
            samples, state = samples[~answer.leaves | state.audited], rest
        return output, samples, state

    def every_exit(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs images (B, C, H, W) to the end: logits (B, E, L) and scores (B, E) of every exit, float32.

        Logits are each exit's own also where exits are combined; scores are those of the combination.

        Raises:
            ValueError: where images have another shape or type.
        """
        self._must_be_whole()
        state, nowhere = self.start(pixel_values), self._thresholds(early_exit=False, given=None)
        logits = np.zeros((len(pixel_values), len(self.exit_layers), len(self.labels)), dtype=np.float32)
        scores = np.zeros(logits.shape[:2], dtype=np.float32)
        for place in self.places if len(pixel_values) else ():
            answer, state = self._run_exit(place, state, nowhere)
            logits[:, place], scores[:, place] = answer.exit_logits, answer.scores
        return logits, scores

    def _counts(self, thresholds: np.ndarray) -> list[bool]:
        """(E,): which exits a run needs: those where an image can leave, since no score is below 0; and all of them
        where an exit's answer depends on those before."""
        if self.config["exit_policy"] == "patience" or combines_exits(self.stages[0][1]):
            return [True] * len(self.exit_layers)
        return [*(thresholds > 0).tolist(), True]

    def _graphs(self, place: int) -> tuple[RunnableGraph, RunnableGraph]:
        """Stage and query graph of an exit, by its place in the whole cascade."""
        return self.stages[place - self.places.start]

    def _skip_exit(self, place: int, state: CascadeState) -> CascadeState:
        """Runs images to an exit that does not count: its layer is computed for all tokens at once."""
        stage, query = self._graphs(place)
        tokens = run_stage(stage, state.hidden)
        hidden = run(query, query_inputs(query, tokens, TOKENS, state.log_probabilities))["outputs"]
        return state._replace(hidden=hidden)

    def _run_exit(self, place: int, state: CascadeState, thresholds: np.ndarray) -> tuple[ExitAnswer, CascadeState]:
        """Runs images to an exit, and those that go on through the rest of its layer.

        Returns:
            What the exit says of all, and the state of those that do not leave, or are audited. From the last exit it
            is that of audited ones, which go no further.
        """
        stage, query = self._graphs(place)
        tokens = run_stage(stage, state.hidden)
        answers = run(query, query_inputs(query, tokens, CLS, state.log_probabilities))
        log_probabilities = answers.get("log_probability_sum", state.log_probabilities)
        logits = answers["logits"]
        # an exit whose logits are not all finite predicts nothing, agrees with none, and is never sure
        finite = np.isfinite(logits).all(-1)
        labels = labels_of(logits)
        streak = np.where(labels == state.labels, state.streak + 1, 1)
        # patience is the only policy whose score depends on the exits before, so that no graph computes it
        if "score" in answers:
            scores = answers["score"]
        else:
            scores = np.where(finite, _patience_score(streak, len(self.exit_layers)), np.float32(np.nan))
        is_last = place == len(thresholds)
        leaves = np.ones(len(finite), dtype=bool) if is_last else (scores < thresholds[place]) & finite
        answer = ExitAnswer(logits, answers.get("exit_logits", logits), scores, leaves & ~state.left)

        # of [CLS] alone so far
        passed = CascadeState(
            answers["outputs"], labels, streak, log_probabilities, state.audited, state.left | leaves
        )
        stays = ~leaves | state.audited
        if not stays.all():
            passed, tokens = passed.select(stays), tokens.select(stays)
        if is_last or not stays.any():
            return answer, passed
        patches = run(query, query_inputs(query, tokens, PATCHES, passed.log_probabilities))["outputs"]
        return answer, passed._replace(hidden=np.concatenate((passed.hidden, patches), axis=1))

    def preprocess(self, images: Sequence[Any]) -> np.ndarray:
        """Reads images (files or PIL images) as the model's image processor does: (B, C, H, W), float32.

        Raises:
            ValueError: where an image cannot be read, or has neither 8 nor 16 bits per channel.
        """
        settings = self.preprocessing
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (settings.mean, settings.std))
        batch = []
        for image in images:
            image = read_image(image)
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

    def _opener(
        self,
        providers: str | Sequence[Any] | None,
        threads: int,
        options: onnxruntime.SessionOptions | None,
        precision: str | None,
    ) -> Callable[[str], RunnableGraph]:
        """What opens a graph of the export by the name of its file, and raises a `ValueError` where that is missing,
        damaged or outside the directory, or has weights in another file."""
        _must("backend", self.backend in BACKENDS, f"one of {', '.join(map(repr, BACKENDS))}", self.backend)
        if self.backend == "openvino":
            if providers is not None or options is not None:
                raise ValueError("providers and options are ONNX Runtime's; they must be left out with OpenVINO.")
            wanted = "bfloat16" if precision is None and self.made_for == "bfloat16" else precision
            open_path = _openvino(wanted, threads)
        elif precision is not None:
            raise ValueError(
                f"precision is chosen for OpenVINO; ONNX Runtime computes in that of the graphs, got {precision!r}."
            )
        else:
            open_path = _onnx_runtime(providers, threads, options)

        directory = self.directory  # not self: in a cycle with it, graphs would wait for the garbage collector

        def open_graph(file: str) -> RunnableGraph:
            path = graph_in(directory, file)
            try:
                return open_path(path)
            except (ImportError, ValueError):
                raise
            except Exception as error:  # ONNX Runtime has an exception class for each of its status codes
                raise ValueError(f"{path} is damaged: {_one_line(error)}") from error

        return open_graph

    def _check_graphs(self) -> None:
        """Raises a `ValueError` where graphs are not those of this cascade, or of other sizes than the config says."""
        for place, graphs in zip(self.places, self.stages):  # noqa: B905  Python 3.8 has no strict
            stage, query = (graph.outputs for graph in graphs)
            combines = combines_exits(graphs[1])
            answers = {"outputs", "logits"} | ({"exit_logits", "log_probability_sum"} if combines else set())
            missing = sorted(({"normed", "keys", "values"} - set(stage)) | (answers - set(query)))
            if missing:
                raise ValueError(
                    f"the graphs of exit {self.exit_layers[place]} in {self.directory} must have all outputs of a "
                    f"stage and a query graph; missing are {', '.join(missing)}."
                )
            _must(
                "id2label in config.json",
                query["logits"][1:] == [len(self.labels)],
                f"of as many labels as the logits of exit {self.exit_layers[place]}",
                f"{len(self.labels)} labels",
            )
            combination = "mean" if combines else "none"
            given = self.config.get("exit_combination", "none")  # a config leaves out what it has by default
            _must(
                "exit_combination in config.json",
                given == combination,
                f"{combination!r}, which the graphs of exit {self.exit_layers[place]} compute",
                given,
            )
        if self.places.start > 0:
            return
        expected = [self.config["num_channels"], *self.image_size]
        found = next(iter(self.stages[0][0].inputs.values()))[1:]
        if found != expected:
            raise ValueError(
                f"num_channels and image_size in config.json must be those of the first graph, {found}, "
                f"got {expected}."
            )

    def _must_be_whole(self) -> None:
        if len(self.places) != len(self.exit_layers):
            raise ValueError(
                f"a cascade that is run from start to end must have all places, range(0, {len(self.exit_layers)}), "
                f"got {self.places}; `advance` runs a part."
            )

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

    def _is_early(self, given: bool | None) -> bool:
        """Whether images leave early: as a call says, or else the config."""
        early_exit: bool = self.config["early_exit"] if given is None else given
        return early_exit

    def _thresholds(self, early_exit: bool | None, given: float | Sequence[float] | None) -> np.ndarray:
        """(E − 1,), float32: the thresholds of the early exits; below all scores where no image leaves early."""
        num_early = len(self.exit_layers) - 1
        if not self._is_early(early_exit):
            if given is not None:
                raise ValueError("exit_thresholds need early_exit=True; without it no image leaves early.")
            return np.full(num_early, -np.inf, dtype=np.float32)
        given = self.config.get("exit_thresholds") if given is None else given
        if given is None:
            raise ValueError("early exit needs exit_thresholds; neither the call nor the export has any.")
        thresholds = np.asarray(given, dtype=np.float32)
        if thresholds.shape not in ((), (num_early,)):
            raise ValueError(f"exit_thresholds must be one number or {num_early}, got {given}.")
        if np.isnan(thresholds).any():
            raise ValueError(f"exit_thresholds must be numbers, got {given}.")
        return np.broadcast_to(thresholds, num_early)


def file_in(directory: Path, name: Any) -> Path:
    """A file of an export. Links may lead to files of the same directory only.

    The Hub's cache is the one exception: there the files of `…/snapshots/REVISION` are links to `…/blobs`.

    Raises:
        ValueError: where the name is not a plain one, or the file is missing, not a regular one, or elsewhere.
    """
    _must(
        f"the name of a file of {directory}",
        isinstance(name, str) and PLAIN_NAME.fullmatch(name),
        "letters, digits, '_', '-' and '.'",
        name,
    )
    file, home = directory / name, Path(os.path.realpath(directory))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parents[1] / "blobs")
    target = Path(os.path.realpath(file))
    if target.parent not in allowed:
        raise ValueError(f"{file} must lie in that directory itself, got a link to {target}.")
    if not file.is_file():
        raise ValueError(f"{file} is missing, or is not a regular file.")
    return file


def graph_in(directory: Path, name: Any) -> Path:
    """A graph of an export, in ONNX's format. It holds its weights itself, as every graph of less than 2 GB does.

    A graph can also name other files for them, anywhere, under the key "location". Not every version of ONNX Runtime
    refuses those outside of the graph's directory.

    Raises:
        ValueError: where it is called otherwise than `….onnx`, since OpenVINO tells formats apart by the name, and
            others have their weights elsewhere; where it has weights in another file; or where `file_in` raises it.
    """
    file = file_in(directory, name)
    _must(f"the name of a graph of {directory}", file.suffix == ".onnx", "one that ends with .onnx", name)
    with file.open("rb") as opened:
        end = b""  # of what was read before
        while chunk := opened.read(READ_AT_ONCE):
            if EXTERNAL_WEIGHTS in end + chunk:
                raise ValueError(f"{file} must hold its weights itself, got a graph that has them in another file.")
            end = (end + chunk)[1 - len(EXTERNAL_WEIGHTS) :]
    return file


def read_description(directory: Path) -> dict[str, Any]:
    """What an exported cascade consists of.

    Returns:
        What cascade.json holds: the `precision` and, for int8, its `target`; and `stages`, for each exit its
        `exit_layer`, the files `stage` and `query`, the exit policy whose `score` these give, and the `cost` of
        leaving there.

    Raises:
        ValueError: where cascade.json is missing, malformed or of an older version.
    """
    description = read_json(directory, "cascade.json")
    stages: list[dict[str, Any]] = description.get("stages")  # type: ignore[assignment]  # until it is checked
    are_objects = isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
    missing = [name for name in ("query", "score") if are_objects and any(name not in stage for stage in stages)]
    if missing or "thresholds" in description:
        what = f", whose cascade.json lacks {' and '.join(missing)}" if missing else ""
        raise ValueError(
            f"{directory} was exported by an older version{what}; export the checkpoint again with `mevit export`."
        )
    _must("stages in cascade.json", are_objects and 0 < len(stages) <= MAX_EXITS, f"1 to {MAX_EXITS} objects", stages)
    layers: list[Any] = [stage.get("exit_layer") for stage in stages]
    _must("exit_layer in cascade.json", all(_is_count(layer, MAX_LAYER) for layer in layers), "a layer number", layers)
    _must("the exit layers in cascade.json", layers == sorted(set(layers)), "in ascending order", layers)
    for stage in stages:
        for graph in ("stage", "query"):
            file_in(directory, stage.get(graph))
    made_for, allowed = description.get("precision", "float32"), [*FILES, "bfloat16"]
    _must("precision in cascade.json", made_for in allowed, f"one of {', '.join(map(repr, allowed))}", made_for)
    return description


def read_stages(directory: Path) -> list[dict[str, Any]]:
    """The graphs of an exported cascade: `stages` of [`read_description`]."""
    stages: list[dict[str, Any]] = read_description(directory)["stages"]
    return stages


def default_backend(made_for: str) -> str:
    """What runs an export, by the precision that cascade.json names."""
    return "openvino" if made_for == "bfloat16" else "onnxruntime"


def check_config(config: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """Checks what the runtime needs of a config.json.

    Args:
        config: what it holds.
        stages: of the cascade.

    Raises:
        ValueError: where a field is missing, malformed or not that of the graphs.
    """
    sides = config.get("image_size")
    sides = sides if isinstance(sides, (list, tuple)) else [sides, sides]
    are_sides = len(sides) == 2 and all(_is_count(side, MAX_SIDE) for side in sides)
    _must("image_size in config.json", are_sides, f"one number or two from 1 to {MAX_SIDE}", config.get("image_size"))
    channels = config.get("num_channels")
    _must("num_channels in config.json", _is_count(channels, MAX_SIDE), f"a number from 1 to {MAX_SIDE}", channels)
    early_exit, policy = config.get("early_exit"), config.get("exit_policy")
    _must("early_exit in config.json", isinstance(early_exit, bool), "true or false", early_exit)
    scores = [stage.get("score") for stage in stages]
    _must("exit_policy in config.json", scores == [policy] * len(stages), f"that of the graphs, {scores[0]!r}", policy)
    layers = [stage["exit_layer"] for stage in stages]
    given = config.get("exit_layers")
    _must("exit_layers in config.json", given == layers, f"those of the graphs, {layers}", given)
    thresholds = config.get("exit_thresholds")
    are_thresholds = thresholds is None or _is_number(thresholds) or _are_numbers(thresholds, len(stages) - 1)
    _must("exit_thresholds in config.json", are_thresholds, f"null, one number or {len(stages) - 1}", thresholds)


def read_labels(config: dict[str, Any]) -> list[str]:
    """Names of the labels, in the order of the logits.

    Raises:
        ValueError: where `id2label` does not name each label from 0 on.
    """
    # a config leaves out what it has by default: two labels of these names
    names = config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"})
    by_key = {str(key): name for key, name in names.items()} if isinstance(names, dict) else {}
    keys = [str(number) for number in range(len(by_key))]
    are_named = len(keys) > 0 and set(keys) == set(by_key) and all(isinstance(name, str) for name in by_key.values())
    _must("id2label in config.json", are_named, "names of the labels 0, 1, and so on", names)
    return [by_key[key] for key in keys]


def read_preprocessing(config: dict[str, Any], image_size: tuple[int, ...]) -> Preprocessing:
    """What an image processor does, from its preprocessor_config.json.

    Args:
        config: what that file holds.
        image_size: height and width that the model needs.

    Raises:
        ValueError: where it resizes or crops otherwise than to a height and width, its images are of another size, or
            a field is missing or malformed.
    """

    def height_and_width(name: str) -> tuple[int, int]:
        given = config.get(name)
        is_size = isinstance(given, dict) and set(given) == {"height", "width"}
        _must(f"the image processor's {name}", is_size, "height and width", given)
        sides: tuple[int, int] = (given["height"], given["width"])  # type: ignore[index]
        are_sides = all(_is_count(side, MAX_SIDE) for side in sides)
        _must(f"the image processor's {name}", are_sides, f"of sides from 1 to {MAX_SIDE}", given)
        return sides

    resize = height_and_width("size") if config.get("do_resize") else None
    crop = height_and_width("crop_size") if config.get("do_center_crop") else None
    if (crop or resize) != image_size:
        raise ValueError(
            f"the image processor must make images of {image_size}, which the model needs, got {crop or resize}."
        )
    resample = config.get("resample")
    is_filter = isinstance(resample, int) and resample in RESAMPLING
    _must("the image processor's resample", is_filter, f"a number from 0 to {RESAMPLING[-1]}", resample)
    rescale = config.get("rescale_factor") if config.get("do_rescale") else 1.0
    _must("the image processor's rescale_factor", _is_number(rescale), "a number", rescale)
    normalizes = config.get("do_normalize")
    mean = config.get("image_mean") if normalizes else [0.0] * CHANNELS
    std = config.get("image_std") if normalizes else [1.0] * CHANNELS
    _must("the image processor's image_mean", _are_numbers(mean, CHANNELS), f"{CHANNELS} numbers", mean)
    are_deviations = _are_numbers(std, CHANNELS) and all(value > 0 for value in std)  # type: ignore[union-attr]
    _must("the image processor's image_std", are_deviations, f"{CHANNELS} numbers above 0", std)
    return Preprocessing(
        resize=resize,
        resample=int(resample),  # type: ignore[arg-type]
        crop=crop,
        rescale=rescale,  # type: ignore[arg-type]
        mean=list(mean),  # type: ignore[arg-type]
        std=list(std),  # type: ignore[arg-type]
    )


def read_image(source: Any) -> Any:
    """Reads an image file or PIL image: a PIL image, upright, RGB with 8 bits. 16-bit grey values v become v / 257.

    Raises:
        ValueError: where it cannot be read, is too large for Pillow, or has neither 8 nor 16 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        if isinstance(source, Image.Image):
            image = ImageOps.exif_transpose(source)
        else:
            with Image.open(source) as file:
                image = ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads to
        raise ValueError(f"cannot read the image {source}: {_one_line(error)}") from error
    if image.mode == "F":
        raise ValueError(
            f"cannot read the image {source}: images must have 8 or 16 bits per channel, got a floating-point image."
        )
    if image.mode == "I" or image.mode.startswith("I;16"):  # older versions of Pillow give "I" for 16-bit PNGs
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"cannot read the image {source}: images must have 8 or 16 bits per channel, got values from "
                f"{values.min()} to {values.max()}."
            )
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image.convert("RGB")


def run(graph: RunnableGraph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a graph: output name → value.

    Raises:
        ValueError: where it cannot run on these inputs.
    """
    try:
        return graph(inputs)
    except Exception as error:  # ONNX Runtime has an exception class for each of its status codes
        raise ValueError(f"a graph of the export does not run: {_one_line(error)}") from error


def stage_inputs(graph: RunnableGraph, state: np.ndarray) -> dict[str, np.ndarray]:
    """What a stage is fed: pixel values (B, C, H, W) if it is the first, else tokens (B, N, d) of the exit before."""
    return {next(iter(graph.inputs)): state}


def run_stage(graph: RunnableGraph, state: np.ndarray) -> Tokens:
    """Runs a stage up to its exit's layer."""
    outputs = run(graph, stage_inputs(graph, state))
    # between neighbouring exits there is no layer, and the stage does not repeat its input
    return Tokens(outputs.get("hidden_state", state), outputs["normed"], outputs["keys"], outputs["values"])


def query_inputs(
    graph: RunnableGraph, tokens: Tokens, queries: slice, log_probabilities: np.ndarray
) -> dict[str, np.ndarray]:
    """What a query graph is fed, to compute its layer for some of the tokens.

    Args:
        graph: that is fed.
        tokens: that its stage handed on.
        queries: which of them.
        log_probabilities: (B, L), summed over the exits passed before. The graph takes them where exits are combined.
    """
    inputs = {
        "hidden_queries": np.ascontiguousarray(tokens.hidden[:, queries]),
        "normed_queries": np.ascontiguousarray(tokens.normed[:, queries]),
        "keys": tokens.keys,
        "values": tokens.values,
    }
    return {**inputs, "previous_sum": log_probabilities} if combines_exits(graph) else inputs


def combines_exits(graph: RunnableGraph) -> bool:
    """Whether a query graph is of a cascade whose exits are combined."""
    return "previous_sum" in graph.inputs


def calibrated_precision(config: dict[str, Any], made_for: str) -> str | None:
    """What the thresholds of a config were chosen in; None where they are not those of a calibration.

    Args:
        config: what config.json holds.
        made_for: the precision in cascade.json, for which older calibrations, that do not tell, were made.
    """
    calibration = config.get("calibration")
    point = calibration.get("operating_point") if isinstance(calibration, dict) else None
    if not isinstance(calibration, dict) or not isinstance(point, dict):
        return None
    thresholds, chosen = config.get("exit_thresholds"), point.get("thresholds")
    if not isinstance(chosen, list) or chosen not in (thresholds, [thresholds] * len(chosen)):
        return None
    details = calibration.get("made_for")
    dtype = details.get("dtype") if isinstance(details, dict) else None
    return dtype if isinstance(dtype, str) else made_for


def labels_of(logits: np.ndarray) -> np.ndarray:
    """(B,), int64: what logits (B, L) predict; −1 where not all are finite."""
    return np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1)


def _patience_score(streak: np.ndarray, num_exits: int) -> np.ndarray:
    """1 − streak / E, float32, of how many exits in a row predict the same label."""
    return np.float32(1) - streak.astype(np.float32) / np.float32(num_exits)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """What one of the JSON files of an export holds.

    Raises:
        ValueError: where it is missing, too large, no JSON object, or `file_in` raises it.
    """
    file = directory / name
    if not file.is_file():
        raise ValueError(f"{directory} is not a finished export of a cascade; it has no {name}.")
    file = file_in(directory, name)
    if file.stat().st_size > MAX_JSON:
        raise ValueError(f"{file} must have at most {MAX_JSON} bytes, got {file.stat().st_size}.")
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {_one_line(error)}.") from error
    _must(str(file), isinstance(content, dict), "a JSON object", content)
    return content


def _must(name: str, is_so: Any, allowed: str, given: Any) -> None:
    """Raises a `ValueError` unless `is_so`."""
    if not is_so:
        raise ValueError(f"{name} must be {allowed}, got {given!r:.100}.")


def _is_number(value: Any) -> bool:
    """Whether it is one that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == count and all(map(_is_number, values))


def _is_count(value: Any, largest: float) -> bool:
    """Whether it is a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _sizes(port: Any) -> list[Any]:
    """Sizes of an input or output of OpenVINO's."""
    return [size.get_length() if size.is_static else None for size in port.get_partial_shape()]


def _onnx_runtime(
    providers: str | Sequence[Any] | None, threads: int, options: onnxruntime.SessionOptions | None
) -> Callable[[Path], RunnableGraph]:
    """What opens graphs in ONNX Runtime, for sessions that take turns.

    Raises:
        ValueError: where a provider is not installed.
    """
    import onnxruntime

    if providers is None:
        providers = ["CPUExecutionProvider"]
    providers = [providers] if isinstance(providers, str) else list(providers)
    installed = onnxruntime.get_available_providers()
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in installed:
            raise ValueError(f"provider {name} is not installed; these are: {', '.join(installed)}.")
    _share_one_allocator()
    options = options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # waiting sessions must neither hold memory of their own nor keep a core busy
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return lambda file: OnnxRuntimeGraph(file, options, providers)


@lru_cache
def openvino_core() -> Any:
    """The `openvino.Core` of this process.

    OpenVINO gives the thread that first asks for the CPU a stack for signals, and frees it with the core, maybe in
    another thread; the next signal then ends the process. So the core lives as long as the process, and that thread
    handles no signals.
    """
    import openvino  # here, since not every machine has it that runs a cascade

    def opened() -> Any:
        core = openvino.Core()
        core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return core

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(opened).result()


def openvino_precisions() -> list[str]:
    """Those of `INFERENCE_PRECISIONS` that OpenVINO computes in on this processor."""
    able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [ours for ours, theirs in CAPABILITIES.items() if theirs in able]


def _openvino(precision: str | None, threads: int) -> Callable[[Path], RunnableGraph]:
    """What opens graphs in OpenVINO."""
    return lambda file: OpenVINOGraph(file, precision, threads)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGE_BLOCK = 2**20  # bytes


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Where the C library is glibc, it takes large blocks straight from the system meanwhile, and gives them back.

    A session that opens holds its weights several times, one after the other. In glibc's heap it is chance which of
    the freed ones go back to the system: a process then holds up to 0.6 of the weights more. Afterwards the heap takes
    blocks of up to 32 MiB, the most that glibc comes to by itself once a program has freed such blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**26)


_allocator_is_shared = False


def _share_one_allocator() -> None:
    """One CPU memory arena for all sessions of the process, where each would keep its own."""
    import onnxruntime

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
            if not np.isfinite(output.logits).all():
                raise ValueError(f"the logits of {file} must be finite, got {output.logits[0].tolist()!s:.100}.")
            probabilities = np.exp(output.logits[0] - output.logits[0].max())
            probabilities /= probabilities.sum()
            label = int(probabilities.argmax())
            print(f"{file}\t{cascade.labels[label]}\t{probabilities[label]:.3f}\texit {output.exit_layer[0]}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"cascade_mevit.py: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
