# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit on a trained model: what it costs, its predictions, thresholds, and how good the run is."""
