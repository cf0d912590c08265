# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Scoring on Ray Data and serving on Ray Serve, on one machine or a cluster. Needs the extra `mevit[scale]`."""
