# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Imported first by the scripts that train: ends them with one line where the extra `train` is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path


MODULES = ("accelerate", "datasets", "evaluate", "matplotlib", "scipy", "torchvision", "yaml")

if missing := [name for name in MODULES if find_spec(name) is None]:
    sys.exit(
        f"{Path(sys.argv[0]).name}: error: training needs {', '.join(missing)}, not installed here: "
        f"pip install 'mevit[train]'"
    )
