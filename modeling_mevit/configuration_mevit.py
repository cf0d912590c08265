# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of a multi-exit Vision Transformer."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real

from transformers import ViTConfig

from .exit_policy_mevit import EXIT_POLICIES


UNCERTAINTY_INPUTS = ("probabilities", "logits", "hidden_state")
UNCERTAINTY_TARGETS = ("distance", "error")


class MEViTConfig(ViTConfig):
    r"""
    Everything of [`ViTConfig`], and where the exits are and what they predict.

    Args:
        exit_layers (`list[int]`, *optional*):
            1-based encoder layers with an exit, ascending; the last one must be the last encoder layer. Defaults to
            the later half of the encoder: `[6, 7, 8, 9, 10, 11, 12]` of 12 layers.
        share_uncertainty_predictor (`bool`, *optional*, defaults to `True`):
            Whether all exits use one uncertainty predictor, as in the paper (equation 3), or one each.
        uncertainty_input (`str`, *optional*, defaults to `"probabilities"`):
            What the predictor reads of its exit: `"probabilities"`, the softmax in descending order, which ranks
            errors best, `"logits"`, as in the paper, or `"hidden_state"`, the normalised [CLS] state (BERxiT).
        uncertainty_target (`str`, *optional*, defaults to `"distance"`):
            What the predictor learns (equation 4): `"distance"`, tanh of the L1 distance between softmax and one-hot
            label, or `"error"`, 1 where the exit's arg-max is wrong and 0 elsewhere.
        exit_policy (`str`, *optional*, defaults to `"uncertainty"`):
            What tells that an exit is sure: its score, `"uncertainty"`, `"confidence"`, `"entropy"` or `"margin"`, of
            which low means sure; or `"patience"`, several exits in a row that agree.
        exit_thresholds (`float` or `list[float]`, *optional*):
            A sample leaves at an early exit whose score is under its threshold: one number for all early exits, or
            one for each, the last exit having none. Calibration chooses them.
        patience (`int`, *optional*, defaults to 2):
            How many exits in a row must agree under `exit_policy="patience"`.
        early_exit (`bool`, *optional*, defaults to `False`):
            Whether `model(pixel_values)` in eval mode lets samples leave early.
        calibration (`dict`, *optional*):
            How the thresholds were chosen and what they promise, as `mevit calibrate` writes it. The model itself
            does not read it.
        kwargs:
            The arguments of [`ViTConfig`]. `image_size` is a side in pixels, or `(height, width)`.

    Raises:
        ValueError: where an argument, or the fit of two of them, allows no model; the message names it.

    Example:

    ```python
    >>> from modeling_mevit import MEViTConfig, MEViTForImageClassification

    >>> config = MEViTConfig(num_labels=196, image_size=448)
    >>> config.exit_layers
    [6, 7, 8, 9, 10, 11, 12]
    >>> model = MEViTForImageClassification(config)
    ```
    """

    model_type = "mevit"
    # what a Trainer's predictions leave out, so that they are (B, L), as of any image classifier
    keys_to_ignore_at_inference = [
        "exit_layer",
        "exit_logits",
        "exit_scores",
        "exit_uncertainty",
        "hidden_states",
        "attentions",
    ]

    def __init__(
        self,
        exit_layers: list[int] | None = None,
        share_uncertainty_predictor: bool = True,
        uncertainty_input: str = "probabilities",
        uncertainty_target: str = "distance",
        exit_policy: str = "uncertainty",
        exit_thresholds: list[float] | float | None = None,
        patience: int = 2,
        early_exit: bool = False,
        calibration: dict | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        depth = self.num_hidden_layers
        if exit_layers is None:
            exit_layers = list(range(max(depth // 2, 1), depth + 1))
        self.exit_layers = list(exit_layers)
        self.share_uncertainty_predictor = share_uncertainty_predictor
        self.uncertainty_input = uncertainty_input
        self.uncertainty_target = uncertainty_target
        self.exit_policy = exit_policy
        self.exit_thresholds = exit_thresholds
        self.patience = patience
        self.early_exit = early_exit
        self.calibration = calibration

        self.check()

        # A model class remembers one Auto class only: saving writes its entry, and the code, beside this one.
        self.auto_map = {
            **(getattr(self, "auto_map", None) or {}),
            "AutoModel": "modeling_mevit.MEViTForImageClassification",
        }

    def check(self) -> None:
        """Raises a `ValueError` where fields allow no model. Models call it too, since fields can be set later."""
        _check_exit_layers(self.exit_layers, self.num_hidden_layers)
        _check_choice("uncertainty_input", self.uncertainty_input, UNCERTAINTY_INPUTS)
        _check_choice("uncertainty_target", self.uncertainty_target, UNCERTAINTY_TARGETS)
        _check_choice("exit_policy", self.exit_policy, EXIT_POLICIES)
        if self.exit_policy == "margin" and self.num_labels < 2:
            raise ValueError(f"exit_policy='margin' needs two labels; the model has {self.num_labels}.")
        _check_grid(self.image_size, self.patch_size)
        if self.exit_policy == "patience" and not 1 <= self.patience <= len(self.exit_layers):
            raise ValueError(
                f"patience={self.patience} is out of range for {len(self.exit_layers)} exits; "
                f"allowed are 1 to {len(self.exit_layers)}."
            )
        if self.exit_thresholds is not None or self.early_exit:
            self.resolve_exit_thresholds()
        calibrated = self.calibration or {}
        if calibrated.get("policy", self.exit_policy) != self.exit_policy and self.exit_thresholds is not None:
            if self.exit_thresholds == calibrated.get("thresholds"):
                raise ValueError(
                    f"exit_thresholds={self.exit_thresholds} were chosen for exit_policy={calibrated['policy']!r}; "
                    f"exit_policy={self.exit_policy!r} needs others."
                )

    def resolve_exit_thresholds(self, given: Sequence[float] | float | None = None) -> list[float]:
        """The threshold of each early exit, E − 1 numbers: those given, or the config's. None for `"patience"`.

        Raises:
            ValueError: where there are none, not E − 1, or one is no number, or where patience would ignore them.
        """
        is_stored = given is None
        given = self.exit_thresholds if is_stored else given
        num_early = len(self.exit_layers) - 1
        if self.exit_policy == "patience":
            if given is not None:
                raise ValueError(f"exit_thresholds={given} have no meaning under exit_policy='patience'.")
            return []
        if given is None:
            raise ValueError(
                f"early exit needs exit_thresholds, {num_early} numbers; neither the call nor the config has any. "
                f"`mevit calibrate` chooses them."
            )
        try:
            thresholds = [float(given)] * num_early if isinstance(given, Real) else [float(one) for one in given]
        except (TypeError, ValueError):
            thresholds = []
        if len(thresholds) != num_early or any(math.isnan(one) for one in thresholds):
            raise ValueError(
                f"exit_thresholds={given} do not fit exits {self.exit_layers}; "
                f"allowed is one number, or {num_early}, one for each exit but the last."
            )
        if is_stored and any(math.isinf(one) for one in thresholds):
            raise ValueError(
                f"exit_thresholds={given} cannot be stored, since JSON has no infinity; "
                f"0 lets nothing leave, and a number above all scores everything."
            )
        return thresholds


def validate_config_fields(config_class: type[ViTConfig], settings: Iterable[str]) -> None:
    """Raises a `ValueError` where a name is no field of a config, which the library would take for one silently."""
    known = {*config_class().to_dict(), "num_labels", "attn_implementation"} - {"dtype", "torch_dtype"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no field of {config_class.__name__}; allowed are {', '.join(sorted(known))}."
        )


def _check_exit_layers(exit_layers: list[int], depth: int) -> None:
    allowed = f"allowed are ascending layer numbers from 1 to {depth}, each once, with {depth} as the last"
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in exit_layers):
        raise ValueError(f"exit_layers={exit_layers} holds something that is no integer; {allowed}.")
    if any(layer < 1 or layer > depth for layer in exit_layers):
        raise ValueError(f"exit_layers={exit_layers} is out of range for {depth} encoder layers; {allowed}.")
    if exit_layers != sorted(set(exit_layers)):
        raise ValueError(f"exit_layers={exit_layers} is unsorted or names a layer twice; {allowed}.")
    if not exit_layers or exit_layers[-1] != depth:
        raise ValueError(f"exit_layers={exit_layers} lacks the last encoder layer; {allowed}.")


def _check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is unknown; allowed are {', '.join(map(repr, allowed))}.")


def _check_grid(image_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    patches = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if any(side <= 0 or side % patch for side, patch in zip(sides, patches, strict=True)):
        raise ValueError(
            f"image_size={image_size} cannot be cut into patches of patch_size={patch_size} pixels; "
            f"allowed are positive multiples of it."
        )


__all__ = ["MEViTConfig"]
