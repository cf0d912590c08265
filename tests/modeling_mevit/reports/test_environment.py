# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

from modeling_mevit import process_memory


def test_a_child_does_not_inherit_the_memory_of_its_parent():
    ballast = bytearray(300 * 2**20)
    ballast[:: 2**12] = b"\1" * len(ballast[:: 2**12])
    assert process_memory.peak() >= process_memory.resident() > 300
    program = f"import runpy; print(runpy.run_path({process_memory.__file__!r})['peak']())"
    child = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert 5 < float(child.stdout) < 200
