# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The runtime audits some of its images while it runs them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_mevit import MEViTCascade, PromiseMonitor
from modeling_mevit.early_exit import monitoring
from modeling_mevit.onnx import cascade_mevit
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.onnx.export import export
from tests.helpers.models import thirds_as_thresholds, tiny_model


pytestmark = pytest.mark.one_major


@pytest.fixture(
    scope="module", params=[("uncertainty", "none"), ("margin", "mean"), ("patience", "none")], ids="-".join
)
def model(request):
    policy, combination = request.param
    # of a seed whose exits agree on some images
    model = tiny_model(4 if policy == "patience" else 0, exit_policy=policy, exit_combination=combination)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    model.config.exit_thresholds = thirds_as_thresholds(model, images)
    if policy == "patience":
        model.config.exit_thresholds = [0.5, 0.5]
    model.config.early_exit = True
    return model


@pytest.fixture(scope="module")
def directory(model, processor, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("monitored") / "out"
    export(model, processor, output, cascade=True)
    return output


@pytest.mark.parametrize("audit", [1.0, 0.4])
def test_answers_stay_and_audited_images_are_counted(directory, model, images, audit):
    expected = Cascade(directory)(images.numpy())
    monitor = PromiseMonitor(0.02, audit=audit, seed=1)
    drawn = PromiseMonitor(0.02, audit=audit, seed=1).draw(len(images))
    assert drawn.any() and (expected.exit_layer < 4).any()
    output = Cascade(directory, monitor=monitor)(images.numpy())
    assert np.array_equal(output.exit_layer, expected.exit_layer)
    assert np.array_equal(output.borderline, expected.borderline)
    np.testing.assert_allclose(output.logits, expected.logits, atol=1e-5)
    with torch.no_grad():
        full = model(images, early_exit=False).logits.argmax(-1).numpy()
    differs = expected.logits.argmax(-1) != full
    assert monitor.counts["seen"] == len(images)
    assert monitor.counts["audited"] == drawn.sum()
    assert monitor.counts["disagreements"] == differs[drawn].sum()
    images_of, early, of_full_run = monitor.last_audit
    assert np.array_equal(images_of, np.flatnonzero(drawn)) and np.array_equal(of_full_run, full[drawn])
    assert np.array_equal(early, expected.logits.argmax(-1)[drawn])
    other = PromiseMonitor(0.02, audit=audit, seed=1)
    other.run(model, images)
    assert all(map(np.array_equal, other.last_audit, monitor.last_audit))
    other.draw(1)
    assert not len(other.last_audit.images)


def test_exits_disagree_so_that_the_counts_can_be_wrong(directory, images):
    monitor = PromiseMonitor(0.02, audit=1.0)
    many = np.concatenate([images.numpy(), -images.numpy(), images.numpy()[:, :, ::-1].copy()])
    Cascade(directory, monitor=monitor)(many)
    assert 0 < monitor.counts["disagreements"] < monitor.counts["audited"] == 24


def test_runs_to_the_end_are_not_audited(directory, images):
    monitor = PromiseMonitor(0.02, audit=1.0)
    cascade = Cascade(directory, monitor=monitor)
    cascade(images.numpy(), early_exit=False)
    cascade.every_exit(images.numpy())
    assert monitor.counts["seen"] == 0
    cascade(images.numpy()[:0])
    assert monitor.counts["audited"] == 0


def test_images_that_are_not_audited_leave_the_batch(directory, images, monkeypatch):
    reached = []
    run_stage = cascade_mevit.run_stage

    def counted(stage, state):
        reached.append(len(state))
        return run_stage(stage, state)

    monkeypatch.setattr(cascade_mevit, "run_stage", counted)
    monitor = PromiseMonitor(0.02, audit=0.4, seed=1)
    drawn = PromiseMonitor(0.02, audit=0.4, seed=1).draw(len(images))
    exit_layer = Cascade(directory, monitor=monitor)(images.numpy()).exit_layer
    # where exits are neither combined nor patient, one at which none can leave is passed all the same
    assert reached == [8, ((exit_layer > 2) | drawn).sum(), ((exit_layer > 3) | drawn).sum()]
    assert reached[-1] < 8


def test_a_cascade_beside_transformers_takes_a_monitor(directory, images):
    monitor = PromiseMonitor(0.02, audit=1.0)
    cascade = MEViTCascade.from_pretrained(directory, monitor=monitor)
    cascade(images)
    assert monitor.counts["audited"] == 8
    other = PromiseMonitor(0.02, audit=1.0)
    other.run(MEViTCascade.from_pretrained(directory), images)
    assert other.counts == monitor.counts


def test_images_that_are_nan_neither_leave_nor_disagree(directory, images):
    monitor = PromiseMonitor(0.02, audit=1.0)
    output = Cascade(directory, monitor=monitor)(np.full_like(images.numpy(), np.nan))
    assert (output.exit_layer == 4).all()
    assert (monitor.counts["audited"], monitor.counts["disagreements"]) == (8, 0)


def test_a_device_watches_without_the_package(directory, image_file, tmp_path):
    assert (directory / "monitoring_mevit.py").read_text() == Path(monitoring.__file__).read_text()
    program = tmp_path / "device.py"
    state = tmp_path / "monitor.json"
    lines = [
        "import sys",
        "for name in ('torch', 'transformers', 'scipy', 'filelock', 'modeling_mevit'):",
        "    sys.modules[name] = None",
        f"sys.path.insert(0, {str(directory)!r})",
        "from cascade_mevit import Cascade",
        "from monitoring_mevit import PromiseMonitor",
        "monitor = PromiseMonitor(0.02, audit=1.0)",
        f"cascade = Cascade({str(directory)!r}, monitor=monitor)",
        f"cascade(cascade.preprocess([{str(image_file)!r}] * 3))",
        f"monitor.save({str(state)!r})",
        "print(monitor)",
    ]
    program.write_text("\n".join(lines))
    answer = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout
    assert answer.startswith("disagreement: ") and "of 3 images; at most 2.00% is allowed" in answer
    merged = PromiseMonitor(0.02)
    merged.merge(json.loads(state.read_text()))
    assert merged.counts["audited"] == 3
