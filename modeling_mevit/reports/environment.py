# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What figures are measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu_info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpu_info.open() if "model name" in line] if cpu_info.exists() else []
    )
    return {
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
    }
