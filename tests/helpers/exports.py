# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Graphs that are written once for many tests, and cascades that run in parts."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from modeling_mevit.modeling_mevit import weights_digest
from modeling_mevit.onnx.graphs import Graph


# fields of a config that no graph depends on, and those that only graphs with an exit depend on
NOT_OF_GRAPHS = ("exit_thresholds", "early_exit", "calibration", "id2label", "label2id")
OF_EXITS = ("exit_policy", "exit_combination", "uncertainty_input")


def write_once(folder: Path, write: Callable[[Graph, Path], None], graph: Graph, file: Path) -> None:
    """Writes a graph, or copies it where one of equal weights and config was written into the folder before."""
    config = graph.module.config
    ignored = NOT_OF_GRAPHS if "logits" in graph.outputs else NOT_OF_GRAPHS + OF_EXITS
    settings = {name: value for name, value in config.to_dict().items() if name not in ignored}
    facts = [
        json.dumps(settings, sort_keys=True, default=str),
        config._attn_implementation,
        type(graph.module).__name__,
        list(graph.inputs),
        list(graph.outputs),
        weights_digest(graph.module.state_dict().items()),
    ]
    written = folder / hashlib.sha256(repr(facts).encode()).hexdigest()
    if not written.exists():
        write(graph, written)
    shutil.copy(written, file)


def run_in_parts(directory: Path, pixel_values: np.ndarray, cuts: Sequence[int], **options: Any) -> Any:
    """What a cascade says of images (B, C, H, W) where it is cut before the exits of some places.

    Each part has its own graphs alone, and only states go from one to the next.
    """
    from modeling_mevit.onnx.cascade_mevit import Cascade, read_stages

    state, samples, answers = None, np.arange(len(pixel_values)), None
    for start, stop in pairwise([0, *cuts, len(read_stages(directory))]):
        part = Cascade(directory, places=range(start, stop))
        output, onward, state = part.advance(state or part.start(pixel_values), **options)
        if answers is None:
            answers = output
        else:
            for whole, of_part in zip(answers[:-1], output[:-1], strict=True):
                whole[samples] = of_part
            answers.borderline[samples] |= output.borderline
        samples = samples[onward]
    assert not len(samples)
    return answers
