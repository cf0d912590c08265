# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own exporters, which 5.x has: they take a model that was cut at an exit."""

import pytest
import torch
from torch.export import Dim


exporters = pytest.importorskip("transformers.exporters", reason="Transformers 4 has no exporters of its own")


@torch.no_grad()
def test_the_onnx_exporter_takes_a_truncated_model(model, images):
    small = model.truncate(3)
    config = exporters.OnnxConfig(dynamic_shapes={"pixel_values": {0: Dim("batch")}})
    exported = exporters.OnnxExporter().export(small, {"pixel_values": images[:2]}, config)
    outputs, expected = exported(pixel_values=images), small(images)
    torch.testing.assert_close(torch.as_tensor(outputs["logits"]), expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.as_tensor(outputs["exit_scores"]), expected.exit_scores, atol=1e-4, rtol=0)
