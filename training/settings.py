# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of a script: dataclasses, filled from a YAML file and from options of the same names, which win."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


CONFIGS = Path(__file__).with_name("configs")
TOKENS = ("hub_token", "push_to_hub_token")
_NUMBERS: dict[Any, tuple[Any, str]] = {int: (int, "whole number"), float: ((int, float), "number")}


class SettingsParser(HfArgumentParser):
    """An [`HfArgumentParser`] whose defaults can come from a mapping.

    Args:
        dataclasses: whose fields are the options.
        script: its name, for usage and messages.
    """

    def __init__(self, dataclasses: Any, script: str):
        usage = f"{script} [CONFIG.yaml] [--option value …]   (--help lists the options)"
        super().__init__(dataclasses, prog=script, usage=usage, allow_abbrev=False)

    def parse(self, argv: list[str], settings: dict[str, Any]) -> tuple[Any, ...]:
        """The dataclasses.

        Args:
            argv: options, which win over the settings.
            settings: name → value, as YAML has it; None stands for the dataclass's own default.

        Raises:
            ValueError: if a name is unknown, a setting is of the wrong type, or one is a token.
        """
        refuse_tokens(argv, settings)
        known = {action.dest for action in self._actions}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"{', '.join(unknown)} is not a setting of {self.prog}; --help lists them")
        for action in self._actions:
            if (value := settings.get(action.dest)) is not None:
                _check(action, value)
                action.default, action.required = value, False
        *parsed, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        self.refuse(unknown)
        return tuple(parsed)

    def given(self, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
        """Options alone, as settings: name → value of those that were given, and what is no option of this parser.

        Raises:
            ValueError: if one is a token.
        """
        refuse_tokens(argv)
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
        namespace, rest = self.parse_known_args(argv)
        return vars(namespace), rest

    def refuse(self, unknown: list[str]) -> None:
        """Raises a `ValueError` if there are options that are unknown."""
        if unknown:
            raise ValueError(f"{' '.join(unknown)} is not an option of {self.prog}; --help lists them")


def refuse_tokens(argv: Sequence[str], settings: Mapping[str, Any] | None = None) -> None:
    """Raises a `ValueError`, which does not repeat it, if an option or a setting is a token of the Hub."""
    options = {option.partition("=")[0][2:].replace("-", "_") for option in argv if option.startswith("--")}
    set_in_file = {name for name, value in (settings or {}).items() if value is not None}
    for name in TOKENS:
        if name in options | set_in_file:
            raise ValueError(
                f"{name} is given {'as an option' if name in options else 'in a file'}, where others can read it; "
                f"log in with `hf auth login`, or set the environment variable HF_TOKEN"
            )


def split_config(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`[CONFIG.yaml] [--option value …]` as the settings of the file, if one comes first, and the options."""
    if argv and argv[0].endswith((".yaml", ".yml")):
        return read_config(argv[0]), argv[1:]
    return {}, argv


def read_config(name: str) -> dict[str, Any]:
    """The settings of a YAML file.

    Args:
        name: a path, or the name of a file in `configs/` beside this script.

    Raises:
        ValueError: if there is no such file, or it holds something else than settings.
    """
    file = Path(name) if Path(name).is_file() else CONFIGS / name
    if not file.is_file():
        names = ", ".join(sorted(config.name for config in CONFIGS.glob("*.yaml")))
        raise ValueError(f"a config must be a YAML file or one of {names}, got {name}")
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{name} must hold a mapping of settings to values, got {type(settings).__name__}")
    return settings


def as_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A setting that is a mapping, given as one, or as JSON in an option.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be JSON, got {value}: {error}") from error
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} must be a mapping of names to values, got {value!r}")
    return value


def _check(action: argparse.Action, value: Any) -> None:
    """Raises a `ValueError` if a setting is not what its option reads. Single strings are left to the parser."""
    is_list = action.nargs == "+"
    if is_list and not isinstance(value, list):
        raise ValueError(f"{action.dest} must be a list, got {value!r}")
    if action.type in _NUMBERS and not isinstance(value, str):
        kind, name = _NUMBERS[action.type]
        if not all(isinstance(one, kind) and not isinstance(one, bool) for one in (value if is_list else [value])):
            wanted = f"a list of {name}s" if is_list else f"a {name}"
            raise ValueError(f"{action.dest} must be {wanted}, got {value!r}")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{action.dest} must be one of {', '.join(map(str, action.choices))}, got {value!r}")
