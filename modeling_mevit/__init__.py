# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-exit Vision Transformers for fine-grained recognition. Importing registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_mevit import MEViTConfig
from .modeling_mevit import MEViTForImageClassification, MEViTOutput


__version__ = "0.1.0"

AutoConfig.register(MEViTConfig.model_type, MEViTConfig)
AutoModel.register(MEViTConfig, MEViTForImageClassification)
AutoModelForImageClassification.register(MEViTConfig, MEViTForImageClassification)

# Checkpoints carry this code along, so that they load where the package is not installed.
MEViTConfig.register_for_auto_class()
MEViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["MEViTConfig", "MEViTForImageClassification", "MEViTOutput"]
