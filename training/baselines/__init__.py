# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Models to compare with. Importing registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageClassification

from .transfg import TransFGConfig, TransFGForImageClassification, TransFGTrainer, predict


AutoConfig.register(TransFGConfig.model_type, TransFGConfig)
AutoModelForImageClassification.register(TransFGConfig, TransFGForImageClassification)

__all__ = ["TransFGConfig", "TransFGForImageClassification", "TransFGTrainer", "predict"]
