# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
from setuptools import setup


setup()
