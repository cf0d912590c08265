# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of this process. Standard library only, so that measuring brings nothing along."""

import resource
import sys
from pathlib import Path


def resident() -> float:
    """MiB that the process holds now; where the system does not tell, what it held at most."""
    return _status("VmRSS") or peak()


def peak() -> float:
    """MiB that the process held at most.

    On Linux of this program alone: `ru_maxrss` would start with what the parent held when it started this process.
    """
    scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _status(name: str) -> float | None:
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:")), None)
