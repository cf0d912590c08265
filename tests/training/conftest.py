# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A run of the training script on a small folder of images, trained once for all tests that do not change it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from tests.helpers.images import write_colours
from tests.helpers.runs import config_file


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Noise around one colour a class, in ImageFolder layout."""
    return write_colours(tmp_path_factory.mktemp("data") / "colours", deviation=40, shape=(22, 26))


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Output directory and metrics of a whole run."""
    directory = tmp_path_factory.mktemp("run")
    output = directory / "colours-mevit"
    return output, train.main([config_file(directory), "--dataset", str(folder), "--output_dir", str(output)])


@pytest.fixture
def run_again(finished, folder, tmp_path) -> tuple[Path, Callable[..., dict[str, Any]]]:
    """A copy of that run, and what gives its command again, with further options."""
    output = shutil.copytree(finished[0], tmp_path / finished[0].name)
    command = [config_file(tmp_path), "--dataset", str(folder), "--output_dir", str(output)]
    return output, lambda *options: train.main([*command, *options])
