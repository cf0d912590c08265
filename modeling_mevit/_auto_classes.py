# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Registers the model with Transformers' Auto classes, without importing Transformers for it.

Registering needs the model class, and with it torch and Transformers: seconds, which `mevit --help` and a program that
only reads the version should not pay. So it waits until the program imports Transformers, which it does before it can
use an Auto class.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


PACKAGE = "modeling_mevit"


def register() -> None:
    """Registers the model with `AutoConfig`, `AutoModel` and `AutoModelForImageClassification`."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    from .configuration_mevit import MEViTConfig
    from .modeling_mevit import MEViTForImageClassification

    AutoConfig.register(MEViTConfig.model_type, MEViTConfig)
    AutoModel.register(MEViTConfig, MEViTForImageClassification)
    AutoModelForImageClassification.register(MEViTConfig, MEViTForImageClassification)

    # Checkpoints carry this code along, so that they load where the package is not installed.
    MEViTConfig.register_for_auto_class()
    MEViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")


def register_with_transformers() -> None:
    """Calls [`register`] now if Transformers is imported already, else right after it is."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Watches for the import of Transformers, by the program or by a module of this package.

    A module of this package that imports Transformers is not finished at that moment, and registering would import it
    once more. So modules of the package are watched too, and [`register`] runs after the outermost of them.
    """

    def __init__(self) -> None:
        self._running = 0  # watched modules that are being executed, one inside the other
        self._is_searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._is_searching or not (fullname == "transformers" or fullname.startswith(f"{PACKAGE}.")):
            return None
        self._is_searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self._running += 1
            try:
                execute(module)
            finally:
                self._running -= 1
            if not self._running and "transformers" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
