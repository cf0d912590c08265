# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modeling_mevit import MEViTForImageClassification
from tests.helpers import distributed_process
from tests.helpers.trainers import assert_same_weights


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


@pytest.mark.slow
def test_two_processes_follow_the_trajectory_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    distributed_process.train(tmp_path / "one", world_size=1)
    # standalone: a free port of its own
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [distributed_process.__file__, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    one, two = (report_of(tmp_path / name) for name in ("one", "two"))
    assert (two["world_size"], two["backend"]) == (2, "gloo")
    assert len(one["log"]) == 10
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        for name in theirs:
            if name.startswith("loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert two["accuracy"] == one["accuracy"]
    models = [MEViTForImageClassification.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert_same_weights(*models)
