# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What an actor scores with, without Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from modeling_mevit._extras import MissingExtraError
from modeling_mevit.early_exit.monitoring import PromiseMonitor
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.scale.score import ScoringActor
from modeling_mevit.scale.scorers import CascadeScorer, NamedContent, open_scorer, scores_of
from modeling_mevit.scale.sources import list_images
from tests.helpers.openvino_here import hide, needs_bfloat16, needs_openvino
from tests.modeling_mevit.scale.conftest import readable


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def for_bfloat16(spread, tmp_path_factory) -> Path:
    """The export as one that was made for bfloat16, which has the same files; not to be changed."""
    copied = shutil.copytree(spread, tmp_path_factory.mktemp("bfloat16") / "export")
    description = json.loads((copied / "cascade.json").read_text())
    (copied / "cascade.json").write_text(json.dumps({**description, "precision": "bfloat16"}))
    return copied


@needs_bfloat16
def test_an_export_for_bfloat16_is_scored_and_audited_in_it(for_bfloat16, noises):
    scorer = open_scorer(str(for_bfloat16), threads=1)
    assert isinstance(scorer, CascadeScorer)
    assert (scorer.cascade.backend, scorer.cascade.precision) == ("openvino", "bfloat16")
    pixel_values = np.stack([scorer.read(NamedContent(file.read_bytes(), "image")) for file in readable(noises)])
    monitor = PromiseMonitor(0.02, audit=1.0)
    given = scorer(pixel_values, monitor)
    output = Cascade(for_bfloat16)(pixel_values)
    expected = scores_of(output.logits, output.exit_layer, output.exit_score, scorer.cascade.labels)
    assert given.labels == expected.labels and len(set(given.exit_layer.tolist())) > 1
    assert given.exit_layer.tolist() == expected.exit_layer.tolist()
    full = scorer.cascade.every_exit(pixel_values)[0][:, -1].argmax(-1)
    assert monitor.counts["audited"] == len(full)
    assert monitor.counts["disagreements"] == (output.logits.argmax(-1) != full).sum()


@needs_bfloat16
def test_openvino_keeps_to_the_threads_of_an_actor_and_to_no_core(for_bfloat16):
    scorer = open_scorer(str(for_bfloat16), threads=1)
    for graph in (one for pair in scorer.cascade.stages for one in pair):
        assert graph.compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert graph.compiled.get_property("ENABLE_CPU_PINNING") is False  # on which all actors would be


@needs_openvino
def test_what_an_export_for_bfloat16_lacks_is_named(for_bfloat16, noises, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--gpus must be 0 for an export made for bfloat16, which runs on the CPU"):
        open_scorer(str(for_bfloat16), on_gpu=True)
    hide("openvino", monkeypatch)
    told = r"needs openvino, which is not installed: pip install 'mevit\[openvino\]'"
    with pytest.raises(MissingExtraError, match=told):
        open_scorer(str(for_bfloat16))
    # where it would be lost with the process, it is handed back
    actor = ScoringActor(str(for_bfloat16), str(tmp_path), "model", 8, 1, False, None)
    (failure,) = actor(list_images(str(noises / "2")))["failure"].to_pylist()
    assert failure.startswith(f"{for_bfloat16} needs openvino, which is not installed")


def test_the_plain_loop_of_the_benchmark_writes_what_a_scorer_says(spread, noises, tmp_path):
    from serving import plain_loop

    files = readable(noises)[:10]
    assert plain_loop(str(spread), files, 4, tmp_path / "rows.json") > 0
    scorer = CascadeScorer(str(spread), threads=1)
    expected = scorer(scorer.cascade.preprocess(files))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row[0] for row in rows] == [str(file) for file in files]
    assert [row[1] for row in rows] == expected.labels
    assert [row[3] for row in rows] == expected.exit_layer.tolist()
    assert [row[4] for row in rows] == pytest.approx(expected.exit_score.tolist(), abs=1e-6)
