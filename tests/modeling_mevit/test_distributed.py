# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_mevit import MEViTForImageClassification
from tests.training.test_trainer import assert_same_weights


SCRIPT = Path(__file__).parents[1] / "scripts" / "distributed.py"


def trained_by(processes: int, directory: Path) -> dict:
    directory.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(SCRIPT), str(directory)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "report.json").read_text())


def test_two_processes_follow_the_trajectory_of_one(tmp_path):
    one, two = trained_by(1, tmp_path / "one"), trained_by(2, tmp_path / "two")
    assert (two["world_size"], two["backend"]) == (2, "gloo")
    assert len(one["log"]) == 10
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        for name in theirs:
            if name.startswith("loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert two["accuracy"] == one["accuracy"]
    models = [MEViTForImageClassification.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert_same_weights(*models)
