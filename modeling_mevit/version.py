# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The version of the package, apart from all else so that reading it imports nothing."""

__version__ = "0.1.0"
