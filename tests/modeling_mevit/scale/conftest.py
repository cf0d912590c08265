# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""One Ray on this machine for all tests that need it. Skipped without the extra `mevit[scale]`."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.images import noise, write_image


if not all(map(find_spec, ("ray", "onnxscript", "python_multipart"))):
    collect_ignore_glob = ["test_*.py"]

IMAGES = 60


def pytest_collection_modifyitems(items):
    """Nothing in this folder depends on the version of Transformers."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.one_major)


@pytest.fixture(scope="session")
def local_ray():
    from modeling_mevit.scale.cluster import connected

    with connected(num_cpus=4):  # more than there are: most processes wait
        yield


@pytest.fixture(scope="session")
def noises(tmp_path_factory) -> Path:
    """A folder of images whose scores lie on both sides of thresholds, and two that cannot be read."""
    folder = tmp_path_factory.mktemp("noises")
    for number in range(IMAGES):
        write_image(folder / f"{number % 3}" / f"{number:03}.png", noise(20 + number % 7, 24, seed=number))
    (folder / "0" / "noise.jpg").write_bytes(b"no image")
    content = (folder / "0" / "000.png").read_bytes()
    (folder / "1" / "truncated.png").write_bytes(content[: len(content) // 2])
    return folder


def readable(folder: Path) -> list[Path]:
    """The images of `noises` that can be read."""
    return sorted(folder.glob("?/0*.png"))


@pytest.fixture(scope="session")
def thresholds(exported, noises) -> list[float]:
    """Midway between scores: under these, a third of the images that reach an early exit leaves there."""
    from modeling_mevit.onnx.cascade_mevit import Cascade

    cascade = Cascade(exported)
    _, scores = cascade.every_exit(cascade.preprocess(readable(noises)))
    chosen, reach = [], np.ones(len(scores), dtype=bool)
    for place in range(2):
        ordered = np.sort(scores[reach, place])
        third = len(ordered) // 3
        chosen.append(float(ordered[third - 1 : third + 1].mean()))
        reach &= scores[:, place] >= chosen[-1]
    return chosen


@pytest.fixture(scope="session")
def spread(exported, thresholds, tmp_path_factory) -> Path:
    """The export with these thresholds; not to be changed."""
    copied = shutil.copytree(exported, tmp_path_factory.mktemp("spread") / "export")
    config = copied / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "exit_thresholds": thresholds}))
    return copied


@pytest.fixture(scope="session")
def promised(spread, tmp_path_factory) -> Path:
    """The same, falsified: it promises that 2 % disagree, under thresholds under which many do; not to be changed."""
    copied = shutil.copytree(spread, tmp_path_factory.mktemp("promised") / "export")
    config = copied / "config.json"
    content = json.loads(config.read_text())
    target = {"max_disagreement": 0.02, "confidence": 0.95}
    point = {
        "policy": content["exit_policy"],
        "thresholds": content["exit_thresholds"],
        "num_samples": 500,
        "disagreements": 0,
    }
    config.write_text(json.dumps({**content, "calibration": {"target": target, "operating_point": point}}))
    return copied


@pytest.fixture(scope="session")
def disagreements(spread, noises) -> dict[str, bool]:
    """Whether the exit that an image takes and the full run give it different labels: path → so or not."""
    from modeling_mevit.onnx.cascade_mevit import Cascade

    cascade = Cascade(spread)
    pixel_values = cascade.preprocess(readable(noises))
    early, full = cascade(pixel_values).logits, cascade.every_exit(pixel_values)[0][:, -1]
    differs = early.argmax(-1) != full.argmax(-1)
    assert 10 < differs.sum() < IMAGES - 10
    return dict(zip(map(str, readable(noises)), differs.tolist(), strict=True))
