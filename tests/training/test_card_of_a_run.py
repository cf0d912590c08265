# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole card of a checkpoint that was trained, calibrated and evaluated, against a pattern."""

import re
from pathlib import Path

import pytest

from modeling_mevit import cli


PLACEHOLDERS = {
    "number": r"[\d.]+",
    "duration": r"\d+ (s|min)",
    "version": r"\S+",
    "hash": "[0-9a-f]{16}",
    "optimizer": r"\w+",
    "machine": ".+",
}


@pytest.mark.slow
def test_the_whole_card(run_again, folder, monkeypatch):
    checkpoint, again = run_again
    again("--license", "mit")
    for command in (["calibrate", str(checkpoint), "--max-cost", "0.9"], ["evaluate", str(checkpoint)]):
        monkeypatch.setattr("sys.argv", ["mevit", *command, "--data", str(folder)])
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
