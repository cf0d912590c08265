# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What people read: tables, figures and the model card, and what the numbers in them were measured on."""
