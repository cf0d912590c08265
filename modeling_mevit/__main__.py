# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m modeling_mevit` is the command `mevit`."""

from .cli import main


main()
