# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A model repository for Triton Inference Server: a model for each graph of a cascade, and one that walks them.

The latter is triton_model.py, with cascade_mevit.py, which says how images go from stage to stage.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from . import cascade_mevit
from .cascade_mevit import read_labels, read_stages


REPOSITORY = "triton"  # folder of the export
NAME = "mevit"  # of the model that clients call; those of the graphs are called mevit_stage_6 and so on
MAX_BATCH = 64  # images that a model takes at once, of one request or of several
SETTINGS = ("config.json", "preprocessor_config.json", "cascade.json")
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}  # of ONNX Runtime, as Triton calls them


def write_repository(directory: Path, open_graph: Callable[[str], onnxruntime.InferenceSession]) -> None:
    """Writes the model repository of an exported cascade into a folder of the export.

    Graphs take no further room where the file system has links: a file of the export has a second name there.

    Args:
        directory: of the export, which has everything else already.
        open_graph: opens a graph by the name of its file.
    """
    repository, graphs = directory / REPOSITORY, {}
    for stage in read_stages(directory):
        for file in (stage["stage"], stage["query"]):
            session = open_graph(file)
            inputs, outputs = ([_value(one) for one in of] for of in (session.get_inputs(), session.get_outputs()))
            del session  # before the next one takes memory
            graphs[file] = {"inputs": [value[:2] for value in inputs], "outputs": [value[:2] for value in outputs]}
            config = _config("onnxruntime", inputs, outputs)
            _link(directory / file, _model(repository, f"{NAME}_{Path(file).stem}", config) / "model.onnx")
    settings = json.loads((directory / "config.json").read_text("utf-8"))
    first = read_stages(directory)[0]["stage"]
    pixel_values = (*graphs[first]["inputs"][0], "tensor(float)")
    answers = [
        ("logits", [None, len(read_labels(settings))], "tensor(float)"),
        ("exit_layer", [None, 1], "tensor(int64)"),
    ]
    version = _model(repository, NAME, _config("python", [pixel_values], answers))
    (version / "graphs.json").write_text(json.dumps(graphs, indent=2) + "\n", encoding="utf-8")
    shutil.copy(Path(__file__).with_name("triton_model.py"), version / "model.py")
    shutil.copy(cascade_mevit.__file__, version)
    for name in SETTINGS:
        shutil.copy(directory / name, version)


def _value(described: Any) -> tuple[str, list[int | None], str]:
    """Name, shape and type of an input or output; None where a dimension may vary."""
    return described.name, [size if isinstance(size, int) else None for size in described.shape], described.type


def _model(repository: Path, name: str, config: str) -> Path:
    """Makes a model's folder with its config. Returns that of its only version."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config, encoding="utf-8")
    return version


def _config(
    backend: str, inputs: Iterable[tuple[str, Sequence[Any], str]], outputs: Iterable[tuple[str, Sequence[Any], str]]
) -> str:
    """A config.pbtxt. A model's name is that of its folder."""
    return "\n".join(
        (
            f'backend: "{backend}"',
            f"max_batch_size: {MAX_BATCH}",
            *(f"input {_tensor(*value)}" for value in inputs),
            *(f"output {_tensor(*value)}" for value in outputs),
            "dynamic_batching { }",
            "",
        )
    )


def _tensor(name: str, shape: Sequence[Any], kind: str) -> str:
    """What a config says of an input or output, whose first dimension is the batch."""
    sizes = [-1 if size is None else size for size in shape[1:]]
    # a dimension of 1 stands for none, which Triton does not know
    scalar = "" if sizes else " reshape { shape: [ ] }"
    return f'{{ name: "{name}" data_type: {TYPES[kind]} dims: [ {", ".join(map(str, sizes or [1]))} ]{scalar} }}'


def _link(file: Path, name: Path) -> None:
    """Gives a file a second name, or copies it where that cannot be."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy(file, name)
