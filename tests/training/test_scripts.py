# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import ast
from pathlib import Path

import pytest


TRAINING = Path(__file__).parents[2] / "training"
FILES = list(TRAINING.rglob("*.py"))
MODULES = {file.stem for file in FILES} | {file.parent.name for file in FILES if file.parent != TRAINING}
SCRIPTS = [file for file in FILES if "__main__" in file.read_text(encoding="utf-8")]

pytestmark = pytest.mark.one_major


def imported_by(file: Path) -> set[str]:
    """Modules that a file imports by their full names, with dots."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_finds_the_files_it_imports(script):
    """Started as its docstring says, a script has its own directory on the path alone; tests have both."""
    files, missing = [script], set()
    for file in files:  # grows
        for name in imported_by(file):
            path = script.parent / name.replace(".", "/")
            found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
            files += [file for file in found if file not in files]
            if not found and name.partition(".")[0] in MODULES:
                missing.add(f"{name}, imported by {file.name}")
    assert not missing
