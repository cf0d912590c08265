# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""From a trained model to files that ONNX Runtime runs on the edge. Needs the extra `mevit[onnx]`."""
