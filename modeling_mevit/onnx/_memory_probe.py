# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Loads one way to run a model. As a script, prints what that takes in memory:

    python _memory_probe.py KIND PATH IMAGE THREADS [PRECISION]

A module of its own that imports nothing until it is told what to load, so that the process measures that alone. Other
files of the package are loaded by their path, since the package around them would import torch.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np


RUNS = 3  # the first ones still allocate


class Loaded(NamedTuple):
    """What runs a model on one image (1, C, H, W), and the precision that it computes in."""

    run: Callable[[np.ndarray], Any]
    precision: str


def load(kind: str, path: Path, threads: int, precision: str | None = None, files: str = "float32") -> Loaded:
    """Loads a way to run a model.

    Args:
        kind: `"torch"` for a checkpoint; `"onnxruntime"` or `"openvino"` for the directory of an export, whose cascade
            it runs, or for one of its files, which takes images to logits.
        path: of it.
        threads: of one operator; the libraries' choice if 0.
        precision: to run in; the checkpoint's or the backend's own by default.
        files: precision that a file of an export is written in; of a directory, cascade.json tells it.
    """
    if kind == "torch":
        return _load_torch(path, threads, precision)
    runtime = _module("onnx/cascade_mevit.py")  # the package's own file: a copy in the export could be anything
    if path.is_dir():
        cascade = runtime.Cascade(path, threads=threads, backend=kind, precision=precision)
        return Loaded(cascade, cascade.precision)
    if kind == "openvino":
        graph = runtime.OpenVINOGraph(path, precision, threads)
    else:
        graph = _onnx_runtime_graph(runtime, path, threads)
    return Loaded(lambda image: graph({"pixel_values": image}), graph.precision_of(files))


def _load_torch(path: Path, threads: int, precision: str | None) -> Loaded:
    import torch
    from transformers import AutoModelForImageClassification

    import modeling_mevit.modeling_mevit  # noqa: F401  registers the model

    if threads:
        torch.set_num_threads(threads)
    model = AutoModelForImageClassification.from_pretrained(
        path, dtype=precision or "auto", trust_remote_code=False
    ).eval()

    @torch.inference_mode()
    def run(image: np.ndarray) -> Any:
        return model(torch.from_numpy(image))

    return Loaded(run, str(model.dtype).removeprefix("torch."))


def _onnx_runtime_graph(runtime: ModuleType, path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # models take turns
    return runtime.OnnxRuntimeGraph(path, options)


@lru_cache  # a copy holds what has to live as long as the process, such as OpenVINO's core
def _module(file: str) -> ModuleType:
    """A file of the package as a module, without the package."""
    path = Path(__file__).parents[1] / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(kind: str, path: str, image: str, threads: str, precision: str = "") -> None:
    """Prints the MiB that the process holds at most for loading and running, more than after imports."""
    memory = _module("reports/environment.py")
    inputs = np.load(image)
    if kind == "torch":
        import transformers  # noqa: F401

        from modeling_mevit.modeling_mevit import MEViTForImageClassification  # noqa: F401
    else:
        importlib.import_module(kind)
    before = memory.rss_mib()
    run = load(kind, Path(path), int(threads), precision or None).run
    for _ in range(RUNS):
        run(inputs)
    print(memory.peak_rss_mib() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
