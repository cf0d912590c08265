# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
import transformers

from modeling_mevit.reports import environment
from modeling_mevit.reports.environment import environment_info, peak_rss_mib


TORCH = torch.__version__.split("+")[0]  # packages do not tell the build


def in_a_fresh_process(expression: str, statements: str = "") -> str:
    """What a process prints that has loaded this one file of the package and run those statements."""
    program = (
        f"import json, mmap, runpy, sys\nmodule = runpy.run_path({environment.__file__!r})\n"
        f"{statements}\nprint({expression})"
    )
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


# 200 MiB in a map of their own, which no allocator had before or keeps afterwards; every page is written to
HOLD_AND_RELEASE = """
rss_mib, peak_rss_mib = module["rss_mib"], module["peak_rss_mib"]
before = rss_mib()
held = mmap.mmap(-1, 200 * 2**20)
for page in range(0, len(held), 2**12):
    held[page] = 1
during, peak = rss_mib(), peak_rss_mib()
held.close()
after, peak_after = rss_mib(), peak_rss_mib()
"""


def ballast(mib: int) -> bytearray:
    """Memory that is really held: every page is written to."""
    held = bytearray(mib * 2**20)
    held[:: 2**12] = b"\1" * len(held[:: 2**12])
    return held


def test_tells_what_numbers_were_measured_on():
    info = environment_info()
    assert (info["cores"], info["python"]) == (os.cpu_count(), platform.python_version())
    assert (info["torch"], info["transformers"]) == (TORCH, transformers.__version__)
    assert (info["accelerator"] is None) is not torch.cuda.is_available()
    assert info["cpu"] and info["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(info)) == info


def test_needs_the_standard_library_alone():
    expression = 'json.dumps([module["environment_info"](), "torch" in sys.modules or "numpy" in sys.modules])'
    info, imported = json.loads(in_a_fresh_process(expression))
    assert not imported and info["accelerator"] is None
    assert {**environment_info(), "accelerator": None, "threads": None} == info


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    info = environment_info()
    assert info["torch"] == TORCH and info["no-such-package"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory now is not told")
def test_memory_rises_with_what_is_held_and_its_peak_stays():
    numbers = in_a_fresh_process("json.dumps([before, during, peak, after, peak_after])", HOLD_AND_RELEASE)
    before, during, peak, after, peak_after = json.loads(numbers)
    assert during - before == pytest.approx(200, abs=20)
    assert during - after == pytest.approx(200, abs=20)
    assert peak > during - 20 and peak_after > during - 20  # the system counts in steps


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the parent too")
def test_a_child_does_not_inherit_the_memory_of_its_parent():
    held = ballast(300)
    assert peak_rss_mib() > 300
    assert 5 < float(in_a_fresh_process('module["peak_rss_mib"]()')) < 200
    del held
