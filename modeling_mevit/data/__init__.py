# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets: where images come from, how they become tensors, and which images they are."""
