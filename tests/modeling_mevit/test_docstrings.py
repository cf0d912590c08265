# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings give what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import modeling_mevit


ROOT = Path(modeling_mevit.__file__).parent
MODULES = sorted(
    ".".join(("modeling_mevit", *file.relative_to(ROOT).with_suffix("").parts))
    for file in ROOT.rglob("*.py")
    if ">>>" in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0 and results.failed == 0


def test_main_classes_have_examples():
    assert {"modeling_mevit.configuration_mevit", "modeling_mevit.modeling_mevit"} <= set(MODULES)
