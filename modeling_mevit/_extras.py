# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Which extra of the package brings a module that is missing."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


_EXTRA_OF = {
    "datasets": "data",
    "scipy": "data",
    "matplotlib": "data",
    "torchvision": "train",
    "accelerate": "train",
    "evaluate": "train",
    "yaml": "train",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "optimum": "optimum",
    "ray": "scale",
    "pyarrow": "scale",
    "fsspec": "scale",
    "python_multipart": "scale",
    "prometheus_client": "scale",
    "starlette": "scale",
    "uvicorn": "scale",
    "openvino": "openvino",
}


def missing_for_training(modules: Iterable[str]) -> str | None:
    """A sentence on those modules that are not installed, and on what brings them; None where all are."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"training needs {', '.join(missing)}, not installed here: pip install 'mevit[train]'"


class MissingExtraError(ModuleNotFoundError):
    """A module is missing that an extra of the package brings; the message says which."""


@contextmanager
def extras_named(what: str) -> Iterator[None]:
    """Turns the error of a module that is missing into one that names the extra which brings it.

    Args:
        what: needs the module.

    Raises:
        MissingExtraError: where a module is missing that an extra brings.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA_OF or isinstance(error, MissingExtraError):
            raise
        raise MissingExtraError(
            f"{what} needs {missing}, which is not installed: pip install 'mevit[{_EXTRA_OF[missing]}]'",
            name=error.name,
        ) from error
