# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole card of a checkpoint that was trained, calibrated and evaluated, against a pattern."""

import re
from pathlib import Path

import pytest

from modeling_mevit import cli
from tests.helpers.images import write_colours
from tests.training.test_train import COLOURS, config_file
from training import train


PLACEHOLDERS = {"number": r"[\d.]+", "hash": "[0-9a-f]{16}", "optimizer": r"\w+", "machine": ".+"}


def test_the_whole_card(tmp_path, monkeypatch):
    data = str(
        write_colours(
            tmp_path / "colours", COLOURS, {"train": 12, "validation": 8, "test": 6}, deviation=40, shape=(22, 26)
        )
    )
    checkpoint = str(tmp_path / "colours-mevit")
    train.main([config_file(tmp_path), "--dataset", data, "--output_dir", checkpoint, "--license", "mit"])
    for command in (["calibrate", checkpoint, "--max-cost", "0.9"], ["evaluate", checkpoint]):
        monkeypatch.setattr("sys.argv", ["mevit", *command, "--data", data])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code

    pattern = re.escape(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    for name, expression in PLACEHOLDERS.items():
        pattern = pattern.replace(f"<{name}>", expression)
    card = Path(checkpoint, "README.md").read_text(encoding="utf-8")
    expected, given = pattern.splitlines(), card.splitlines()
    for line_pattern, line in zip(expected, given, strict=False):
        assert re.fullmatch(line_pattern.rstrip("\\"), line), line  # an escaped line break ends in a backslash
    assert len(expected) == len(given)
