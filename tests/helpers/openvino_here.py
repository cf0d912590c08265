# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What tests of exports that OpenVINO runs need of the machine."""

import sys
from importlib.util import find_spec

import pytest

from modeling_mevit.onnx import cascade_mevit
from modeling_mevit.onnx.cascade_mevit import openvino_core, openvino_precisions


def computes_in_bfloat16() -> bool:
    """Whether OpenVINO is there, and this processor computes in bfloat16."""
    if not find_spec("openvino"):
        return False
    return "bfloat16" in openvino_precisions()


def hide(package: str, patch: pytest.MonkeyPatch) -> None:
    """As where a runtime is not installed, and OpenVINO was not opened in this process."""
    patch.setattr(cascade_mevit, "openvino_core", openvino_core.__wrapped__)
    patch.setitem(sys.modules, package, None)


needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="needs the extra mevit[openvino]")
needs_bfloat16 = pytest.mark.skipif(
    not computes_in_bfloat16(), reason="needs OpenVINO, and a processor that computes in bfloat16"
)
