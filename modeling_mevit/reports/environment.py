# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What numbers are measured on, and the memory of this process.

It imports nothing but the standard library, so that a process that measures its memory holds nothing because of it.
"""

import os
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any


PACKAGES = ("torch", "transformers", "datasets", "onnxruntime")


def environment_info() -> dict[str, Any]:
    """Processor, cores, accelerator and threads as torch has them, and versions of Python and [`PACKAGES`].

    A package that is not installed has version None; so have accelerator and threads where torch is not imported.
    """
    torch = sys.modules.get("torch")
    return {
        "accelerator": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "python": platform.python_version(),
        **{name: next((found.version for found in distributions(name=name)), None) for name in PACKAGES},
    }


def rss_mib() -> float:
    """MiB of memory that the process holds now (its resident set); where the system does not tell, its peak."""
    return _status_mib("VmRSS") or peak_rss_mib()


def peak_rss_mib() -> float:
    """MiB of memory that the process held at most, on Linux or macOS.

    On Linux that is the peak of this program: `ru_maxrss` would start with what the parent held when it started
    this process.
    """
    import resource  # not on Windows, where the rest of this module works

    bytes_per_unit = 1 if sys.platform == "darwin" else 2**10
    return _status_mib("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**20


def _status_mib(name: str) -> float | None:
    """A number of `/proc/self/status`, which gives KiB; None where there is no such file."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:")), None)


def _cpu_name() -> str:
    """The processor's own name where Linux tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
