# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Imported first by the scripts that train: ends them with one line where the extra `train` is not installed."""

import sys
from pathlib import Path

from modeling_mevit._extras import missing_for_training


MODULES = ("accelerate", "datasets", "evaluate", "matplotlib", "scipy", "torchvision", "yaml")

if message := missing_for_training(MODULES):
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")
