# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole card of a checkpoint that was trained, calibrated and evaluated, against a pattern."""

import re
from pathlib import Path

import pytest
import yaml

import train
from modeling_mevit import cli
from tests.helpers.images import write_colours


COLOURS = {"crimson": (200, 20, 60), "indigo": (75, 0, 130), "teal": (0, 128, 128)}
SETTINGS = {
    "image_size": 16,
    "resize_size": 20,
    "exit_layers": [1, 2, 3],
    "model_config": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": 4,
    },
    "learning_rate": 0.003,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 6,
    "license": "mit",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "seed": 0,
}
PLACEHOLDERS = {
    "number": r"[\d.]+",
    "duration": r"\d+ (s|min)",
    "version": r"\S+",
    "hash": "[0-9a-f]{16}",
    "optimizer": r"\w+",
    "machine": ".+",
}


def test_the_whole_card(tmp_path, monkeypatch):
    sizes = {"train": 12, "validation": 8, "test": 6}
    data = str(write_colours(tmp_path / "colours", COLOURS, sizes, deviation=40, shape=(22, 26)))
    config, checkpoint = tmp_path / "config.yaml", tmp_path / "colours-mevit"
    config.write_text(yaml.safe_dump(SETTINGS))
    train.main([str(config), "--dataset", data, "--output_dir", str(checkpoint)])
    for command in (["calibrate", str(checkpoint), "--max-cost", "0.9"], ["evaluate", str(checkpoint)]):
        monkeypatch.setattr("sys.argv", ["mevit", *command, "--data", data])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code

    pattern = re.escape(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    for name, expression in PLACEHOLDERS.items():
        pattern = pattern.replace(f"<{name}>", expression)
    expected = pattern.splitlines()
    given = (checkpoint / "README.md").read_text(encoding="utf-8").splitlines()
    for line_pattern, line in zip(expected, given, strict=False):
        assert re.fullmatch(line_pattern.rstrip("\\"), line), line  # an escaped line break ends in a backslash
    assert len(expected) == len(given)
