# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Which extra of the package brings a module that is missing."""

from importlib import import_module
from types import ModuleType


_EXTRA_OF = {
    "datasets": "data",
    "scipy": "data",
    "matplotlib": "data",
    "torchvision": "train",
    "accelerate": "train",
    "evaluate": "train",
    "yaml": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "optimum": "onnx",
}


class MissingExtraError(ModuleNotFoundError):
    """A module is missing that an extra of the package brings; the message says which."""


def import_with_hint(name: str) -> ModuleType:
    """Imports a module of this package.

    Raises:
        MissingExtraError: where it needs a module that is not installed and that an extra brings.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA_OF:
            raise
        raise MissingExtraError(
            f"{name} needs {missing}, which is not installed: pip install 'mevit[{_EXTRA_OF[missing]}]'",
            name=error.name,
        ) from error
