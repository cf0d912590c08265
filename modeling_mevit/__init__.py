# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-exit Vision Transformers for fine-grained recognition.

Importing the package registers the model with Transformers' Auto classes. What it exports is imported when it is first
used: a checkpoint loads with torch and Transformers alone, and the Trainer, data sets and ONNX Runtime cost nothing
where they are not used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._auto_classes import register_with_transformers
from ._extras import extras_named
from .version import __version__


if TYPE_CHECKING:
    from .configuration_mevit import MEViTConfig
    from .data.image_dataset import DataSource, ImageClassificationDataset
    from .early_exit.calibration import CalibrationResult, calibrate
    from .early_exit.calibration_target import CalibrationTarget
    from .early_exit.evaluation import Evaluation, evaluate
    from .early_exit.monitoring import PromiseMonitor
    from .modeling_mevit import MEViTForImageClassification, MEViTOutput
    from .onnx.export import export
    from .onnx.quantize import Quantization
    from .onnx.runtime import MEViTCascade
    from .trainer import MEViTTrainer
    from .training_args import MEViTTrainingArguments

_MODULE_OF = {
    "MEViTConfig": "configuration_mevit",
    "MEViTForImageClassification": "modeling_mevit",
    "MEViTOutput": "modeling_mevit",
    "MEViTTrainer": "trainer",
    "MEViTTrainingArguments": "training_args",
    "DataSource": "data.image_dataset",
    "ImageClassificationDataset": "data.image_dataset",
    "CalibrationTarget": "early_exit.calibration_target",
    "CalibrationResult": "early_exit.calibration",
    "calibrate": "early_exit.calibration",
    "Evaluation": "early_exit.evaluation",
    "evaluate": "early_exit.evaluation",
    "PromiseMonitor": "early_exit.monitoring",
    "export": "onnx.export",
    "Quantization": "onnx.quantize",
    "MEViTCascade": "onnx.runtime",
}

__all__ = [
    "CalibrationResult",
    "CalibrationTarget",
    "DataSource",
    "Evaluation",
    "ImageClassificationDataset",
    "MEViTCascade",
    "MEViTConfig",
    "MEViTForImageClassification",
    "MEViTOutput",
    "MEViTTrainer",
    "MEViTTrainingArguments",
    "PromiseMonitor",
    "Quantization",
    "__version__",
    "calibrate",
    "evaluate",
    "export",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras_named(name):
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_with_transformers()
