# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A model repository for Triton Inference Server: a model for each graph of a cascade, and one that walks them.

The latter is triton_model.py, with cascade_mevit.py, which says how images go from stage to stage.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from . import cascade_mevit
from .cascade_mevit import graph_in, read_labels, read_stages


REPOSITORY = "triton"  # folder of the export
NAME = "mevit"  # of the model that clients call; those of the graphs are called mevit_stage_6 and so on
MAX_BATCH = 64  # images that a model takes at once, of one request or of several
SETTINGS = ("config.json", "preprocessor_config.json", "cascade.json")
TYPES: dict[int, str] = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.INT64: "TYPE_INT64"}  # as Triton calls them


def write_repository(directory: Path) -> None:
    """Writes the model repository of an exported cascade into a folder of the export.

    Graphs take no further room where the file system has links: a file of the export has a second name there.

    Args:
        directory: of the export, which has everything else already.
    """
    repository, graphs = directory / REPOSITORY, {}
    for stage in read_stages(directory):
        for file in (stage["stage"], stage["query"]):
            graph = onnx.load(graph_in(directory, file)).graph
            inputs, outputs = ([_value(one) for one in ports] for ports in (graph.input, graph.output))
            del graph  # before the next one takes memory
            graphs[file] = {
                ports: {name: shape for name, shape, _ in values}
                for ports, values in (("inputs", inputs), ("outputs", outputs))
            }
            config = _config("onnxruntime", inputs, outputs)
            _link(directory / file, _model(repository, f"{NAME}_{Path(file).stem}", config) / "model.onnx")
    settings = json.loads((directory / "config.json").read_text("utf-8"))
    first = read_stages(directory)[0]["stage"]
    ((name, shape),) = graphs[first]["inputs"].items()
    pixel_values = (name, shape, TensorProto.FLOAT)
    answers = [
        ("logits", [None, len(read_labels(settings))], TensorProto.FLOAT),
        ("exit_layer", [None, 1], TensorProto.INT64),
    ]
    version = _model(repository, NAME, _config("python", [pixel_values], answers))
    (version / "graphs.json").write_text(json.dumps(graphs, indent=2) + "\n", encoding="utf-8")
    shutil.copy(Path(__file__).with_name("triton_model.py"), version / "model.py")
    shutil.copy(cascade_mevit.__file__, version)
    for name in SETTINGS:
        shutil.copy(directory / name, version)


def _value(described: onnx.ValueInfoProto) -> tuple[str, list[int | None], int]:
    """Name, shape and type of an input or output; None where a dimension may vary."""
    tensor = described.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    return described.name, shape, tensor.elem_type


def _model(repository: Path, name: str, config: str) -> Path:
    """Makes a model's folder with its config. Returns that of its only version."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config, encoding="utf-8")
    return version


def _config(
    backend: str, inputs: Iterable[tuple[str, Sequence[Any], int]], outputs: Iterable[tuple[str, Sequence[Any], int]]
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


def _tensor(name: str, shape: Sequence[Any], kind: int) -> str:
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
