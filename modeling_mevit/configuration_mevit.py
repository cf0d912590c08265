# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of a multi-exit Vision Transformer."""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from transformers import ViTConfig
from transformers.activations import ACT2FN

from .exit_policy_mevit import EXIT_COMBINATIONS, EXIT_POLICIES


UNCERTAINTY_INPUTS = ("probabilities", "logits")
# What shapes the answers and cannot be told from the weights alone, so that an edit of config.json would go unseen.
ARCHITECTURE_FIELDS = (
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    "exit_layers",
    "uncertainty_input",
)


class MEViTConfig(ViTConfig):
    """Everything of [`ViTConfig`], where the exits are, and when a sample leaves at one.

    Args:
        exit_layers: 1-based encoder layers with an exit, ascending; the last one must be the last encoder layer.
            Defaults to the later half of the encoder: `[6, 7, 8, 9, 10, 11, 12]` of 12 layers.
        uncertainty_input: what the uncertainty predictor, one for all exits (equation 3), reads of an exit:
            `"probabilities"`, the softmax in descending order, which ranks errors best, or `"logits"`, as in the
            paper.
        exit_policy: which score says that an exit is sure, low being sure: `"uncertainty"`, `"confidence"`,
            `"entropy"`, `"margin"` or `"patience"`.
        exit_combination: what an exit predicts with, and what its score is taken of: `"none"`, its own logits, or
            `"mean"`, the mean of the log-probabilities of the exits passed so far, itself included. Training does
            not depend on it, so that it can be changed in a trained model; calibrate again afterwards. A predictor
            that reads `"logits"` cannot read that mean, so that the policy is not `"uncertainty"` then.
        exit_thresholds: a sample leaves at an early exit whose score is under its threshold: one number for all early
            exits, or one for each, the last exit having none. Calibration chooses them.
        early_exit: whether `model(pixel_values)` in eval mode lets samples leave early.
        calibration: how the thresholds were chosen, what they gave and what that was found for, as
            `CalibrationResult.apply_to` writes it. Early exit does not read it; `model.certificate` does.
        training_images: which images trained the model: the first 6 bytes of the SHA-256 of each one's file, sorted,
            in base64. `training/train.py` writes it, and `from_vit` takes it over from a MEViT with one exit. The
            model itself does not read it.
        kwargs: the arguments of [`ViTConfig`]. `image_size` is a side in pixels, or `(height, width)`.

    Raises:
        ValueError: if an argument, or two of them together, allow no model; the message names it.

    Example:

    ```python
    >>> from modeling_mevit import MEViTConfig

    >>> config = MEViTConfig(num_labels=196, image_size=448)
    >>> config.exit_layers
    [6, 7, 8, 9, 10, 11, 12]
    >>> config.resolve_exit_thresholds(0.2)
    [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]

    ```
    """

    model_type = "mevit"
    # what a Trainer's predictions leave out, so that they are (B, L), as of any image classifier
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
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
        uncertainty_input: str = "probabilities",
        exit_policy: str = "uncertainty",
        exit_combination: str = "none",
        exit_thresholds: list[float] | float | None = None,
        early_exit: bool = False,
        calibration: dict[str, Any] | None = None,
        training_images: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("architecture_digest", None)  # of `to_dict`, which takes it anew
        _check_fields({**kwargs, "early_exit": early_exit, "calibration": calibration})
        if exit_layers is not None:
            _check_fields({"exit_layers": exit_layers})
        super().__init__(**kwargs)  # type: ignore[no-untyped-call, unused-ignore]
        if exit_layers is None:
            exit_layers = _default_exit_layers(self.num_hidden_layers)
        self.exit_layers = list(exit_layers)
        self.uncertainty_input = uncertainty_input
        self.exit_policy = exit_policy
        self.exit_combination = exit_combination
        self.exit_thresholds = exit_thresholds
        self.early_exit = early_exit
        self.calibration = calibration
        self.training_images = training_images
        self.validate()

    def validate(self) -> None:
        """Raises a `ValueError` if fields allow no model. Models call it too, since fields can be set later."""
        _check_fields(vars(self))
        _check_exit_layers(self.exit_layers, self.num_hidden_layers)
        _check_choice("uncertainty_input", self.uncertainty_input, UNCERTAINTY_INPUTS)
        _check_choice("exit_policy", self.exit_policy, EXIT_POLICIES)
        _check_choice("exit_combination", self.exit_combination, EXIT_COMBINATIONS)
        _check_training_images(self.training_images)
        _check_choice("problem_type", self.problem_type, (None, "single_label_classification"))
        if self.exit_policy == "uncertainty" and not self.predicts_uncertainty:
            raise ValueError(
                f"exit_policy='uncertainty' needs exit_combination='none' or uncertainty_input='probabilities', since "
                f"a predictor that was trained on logits ranks a mean of log-probabilities wrongly; got "
                f"exit_combination={self.exit_combination!r} and uncertainty_input={self.uncertainty_input!r}."
            )
        if self.exit_policy == "margin" and self.num_labels < 2:
            raise ValueError(f"exit_policy='margin' needs at least 2 labels, got num_labels={self.num_labels}.")
        _check_grid(self.image_size, self.patch_size)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size={self.hidden_size}, got {self.num_attention_heads}."
            )
        if self.exit_thresholds is None and not self.early_exit:
            return
        thresholds = self.resolve_exit_thresholds()
        calibrated = (self.calibration or {}).get("operating_point")
        if calibrated and calibrated["policy"] != self.exit_policy and calibrated["thresholds"] == thresholds:
            raise ValueError(
                f"exit_thresholds={self.exit_thresholds} were calibrated for exit_policy={calibrated['policy']!r}, "
                f"got exit_policy={self.exit_policy!r}, which needs others."
            )

    @property
    def predicts_uncertainty(self) -> bool:
        """Whether the predictor can read what an exit predicts with. One that was trained on an exit's own logits
        cannot read a mean of log-probabilities, which is shifted against them by another number for each sample."""
        return self.exit_combination == "none" or self.uncertainty_input == "probabilities"

    def resolve_exit_thresholds(self, override: Sequence[float] | float | None = None) -> list[float]:
        """The threshold of each early exit: E − 1 numbers, from `override` or else from the config.

        Raises:
            ValueError: if there are none, not one or E − 1 of them, or if one is not a number.
        """
        num_early = len(self.exit_layers) - 1
        given: Any = self.exit_thresholds if override is None else override
        if given is None:
            raise ValueError(
                f"early exit needs exit_thresholds, {num_early} numbers; neither the call nor the config has any. "
                f"`mevit calibrate` chooses them."
            )
        thresholds = _listed(given, num_early)
        is_list = isinstance(thresholds, list) and len(thresholds) == num_early
        if not is_list or not all(isinstance(one, Real) and not math.isnan(one) for one in thresholds):
            raise ValueError(
                f"exit_thresholds must be one number, or {num_early} for exits {self.exit_layers}, one for each but "
                f"the last; got {given}."
            )
        if override is None and any(math.isinf(one) for one in thresholds):
            raise ValueError(
                f"exit_thresholds of a config must be finite, since JSON has no infinity, got {given}; "
                f"0 lets no sample leave early."
            )
        return [float(one) for one in thresholds]

    def made_for(self) -> dict[str, Any]:
        """What a calibration of this config holds for: `exit_layers`, `exit_combination`, and `architecture`, the
        digest of its fields."""
        return {
            "exit_layers": list(self.exit_layers),
            "exit_combination": self.exit_combination,
            "architecture": architecture_digest(self.to_dict()),
        }

    def calibration_mismatches(self) -> list[str]:
        """What differs from what the calibration was made for, as far as a config tells; empty where nothing does."""
        calibration = self.calibration or {}
        point = calibration.get("operating_point")
        differing = []
        if point and point.get("policy") != self.exit_policy:
            differing.append(f"exit_policy is {self.exit_policy!r}, not {point.get('policy')!r}")
        thresholds = _listed(self.exit_thresholds, len(self.exit_layers) - 1)
        if point and thresholds is None:
            differing.append("exit_thresholds are gone")
        elif point and point.get("thresholds") != thresholds:
            differing.append(f"exit_thresholds are {thresholds}, not {point.get('thresholds')}")
        combination = self._calibrated_combination()
        if calibration and combination != self.exit_combination:
            differing.append(f"exit_combination is {self.exit_combination!r}, not {combination!r}")
        found = self.made_for()
        made_for = {**found, **(calibration.get("made_for") or {})}
        if found["exit_layers"] != made_for["exit_layers"]:
            differing.append(f"exit_layers are {self.exit_layers}, not {made_for['exit_layers']}")
        elif found["architecture"] != made_for["architecture"]:
            differing.append(f"fields of the architecture ({', '.join(ARCHITECTURE_FIELDS)}) have other values")
        if calibration and made_for.get("promise", promise := promise_digest(calibration)) != promise:
            differing.append("the target, or what was measured for it, is not what calibration wrote")
        return differing

    def precision_warning(self, precision: str, of_weights: bool = False) -> str | None:
        """What to warn of where calibrated thresholds are used in another precision than they were chosen in, since
        scores differ there; None where they are not, or the calibration does not tell.

        Args:
            precision: such as `"bfloat16"`, as `MEViTForImageClassification.precision` and the runtimes tell it.
            of_weights: whether it is that of the weights alone, before it is known whether autocast will be on.
        """
        expected = ((self.calibration or {}).get("made_for") or {}).get("dtype")
        if expected and of_weights:
            expected = expected.split()[0]  # "with autocast to …" may follow
        if expected in (None, precision) or not self._has_calibrated_thresholds():
            return None
        if is_certified(self.calibration):
            return certificate_is_gone([precision_mismatch(precision, expected)])
        return (
            f"exit_thresholds were chosen in {expected}, got {precision}, where scores differ; "
            f"`mevit calibrate` chooses them anew."
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the digest of those that the weights cannot tell."""
        fields: dict[str, Any] = super().to_dict()
        return {**fields, "architecture_digest": architecture_digest(fields)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a `config.json` holds; Transformers only warns if it is another model's.

        Raises:
            ValueError: if it is another model's, that of a MEViT whose predictor is of a retired kind, or malformed.

        Warns:
            UserWarning: if fields of the architecture were edited since it was written, or what a certificate was
                made for, or if thresholds were chosen under another combination of the exits.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type of a checkpoint must be {cls.model_type!r}, got {model_type!r}; "
                f"MEViTForImageClassification.from_vit starts from a plain ViT."
            )
        _check_fields(config_dict)
        fields = _without_retired_fields(config_dict)
        written = fields.pop("architecture_digest", None)
        if written is not None:
            as_read = super().from_dict(fields).to_dict()  # arguments of the call are no edits of the file
            if as_read["architecture_digest"] != written:
                values = ", ".join(f"{name}={as_read[name]!r}" for name in ARCHITECTURE_FIELDS)
                warnings.warn(
                    f"fields of the architecture in config.json were edited since the checkpoint was written, so its "
                    f"weights may give other answers. They now say {values}. Restore them, or save the model again if "
                    f"this is what it should be.",
                    stacklevel=2,
                )
        loaded = super().from_dict(fields, **kwargs)
        config: MEViTConfig = loaded[0] if isinstance(loaded, tuple) else loaded
        if is_certified(config.calibration) and (differing := config.calibration_mismatches()):
            warnings.warn(certificate_is_gone(differing), stacklevel=2)
        elif config._has_calibrated_thresholds() and config._calibrated_combination() != config.exit_combination:
            warnings.warn(
                f"exit_thresholds were chosen for exit_combination={config._calibrated_combination()!r}, got "
                f"{config.exit_combination!r}, where scores differ; `mevit calibrate` chooses them anew.",
                stacklevel=2,
            )
        return loaded

    def _has_calibrated_thresholds(self) -> bool:
        point = (self.calibration or {}).get("operating_point") or {}
        return bool(point) and _listed(self.exit_thresholds, len(self.exit_layers) - 1) == point.get("thresholds")

    def _calibrated_combination(self) -> str:
        """How exits were combined when the calibration was made; older ones do not tell, since there was no choice."""
        made_for = (self.calibration or {}).get("made_for") or {}
        return str(made_for.get("exit_combination", "none"))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes `config.json`, and this code beside it."""
        # `AutoModel` gives the classifier too, since there is no use for a headless MEViT: exits are what it adds to a
        # ViT. `register_for_auto_class` remembers one Auto class for a model, so this entry is written here.
        self.auto_map = {
            **(getattr(self, "auto_map", None) or {}),
            "AutoModel": "modeling_mevit.MEViTForImageClassification",
        }
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def architecture_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256, shortened, of the fields of a config that the weights cannot tell (`ARCHITECTURE_FIELDS`)."""
    text = json.dumps([[name, fields[name]] for name in ARCHITECTURE_FIELDS])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def promise_digest(calibration: Mapping[str, Any]) -> str:
    """SHA-256, shortened, of what a calibration was asked for and what it measured."""
    text = json.dumps([calibration.get("target"), calibration.get("operating_point")])
    text = json.dumps(json.loads(text), sort_keys=True)  # keys are strings on disk, and may be numbers before
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_certified(calibration: dict[str, Any] | None) -> bool:
    """Whether a calibration was made with a confidence, or in expectation."""
    target = (calibration or {}).get("target") or {}
    return target.get("confidence") is not None or target.get("guarantee") is not None


def certificate_is_gone(differing: Iterable[str]) -> str:
    """What tells that a certificate no longer holds, and why."""
    return (
        f"the certificate of early exit is gone: {'; '.join(differing)}. Early exit still runs, but nothing is "
        f"promised of it; `mevit calibrate` certifies it again."
    )


def precision_mismatch(found: str, expected: str | None) -> str:
    """How a precision differs from that of a calibration."""
    return f"the precision is {found}, not {expected}"


def validate_config_fields(config_class: type[ViTConfig], settings: Iterable[str]) -> None:
    """Raises a `ValueError` if a name is not a field of a config: Transformers would silently add it as one."""
    known = {*config_class().to_dict(), "num_labels", "attn_implementation"} - {
        "dtype",
        "torch_dtype",
        "architecture_digest",
    }
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"{config_class.__name__} has no field {', '.join(unknown)}; allowed are {', '.join(sorted(known))}."
        )


def _listed(thresholds: Any, num_early: int) -> Any:
    """Thresholds as a list, one number repeated, if they are of a type that can be one."""
    thresholds = thresholds.tolist() if hasattr(thresholds, "tolist") else thresholds  # of an array or a tensor
    if isinstance(thresholds, Real):
        return [thresholds] * num_early
    return list(thresholds) if isinstance(thresholds, tuple) else thresholds


def _check_exit_layers(exit_layers: list[int], depth: int) -> None:
    are_ascending = all(type(layer) is int for layer in exit_layers) and exit_layers == sorted(set(exit_layers))
    if not (exit_layers and are_ascending and exit_layers[0] >= 1 and exit_layers[-1] == depth):
        raise ValueError(
            f"exit_layers must be ascending layer numbers from 1 to {depth}, with {depth} as the last; "
            f"got {exit_layers}."
        )


def _check_choice(name: str, given: str | None, allowed: tuple[str | None, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {given!r}.")


def _check_training_images(encoded: Any) -> None:
    if encoded is not None and not _is_encoded(encoded):
        raise ValueError(
            f"training_images must be base64 of 6 bytes for each image, 8 characters, or None; got {encoded!r:.60}."
        )


def _is_number(value: Any, least: float = 0.0, most: float = math.inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) <= most


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value)))


def _is_dtype(value: Any) -> bool:
    named = getattr(torch, value, None) if isinstance(value, str) else value
    return value in (None, "auto") or isinstance(named, torch.dtype)


def _is_calibration(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not all(isinstance(part, dict | None) for part in value.values()):
        return False
    point, data, made_for = (value.get(name) or {} for name in ("operating_point", "data", "made_for"))
    return (
        (not point or isinstance(point.get("policy"), str))
        and ("thresholds" not in point or isinstance(point["thresholds"], list))
        and all(isinstance(data.get(name, ""), str) for name in ("name", "split"))
        and (not data or {"name", "split"} <= data.keys())
        and _is_encoded(data.get("image_digests", ""))
        and all(isinstance(made_for.get(name, ""), str) for name in ("architecture", "dtype", "promise"))
    )


def _is_older_calibration(value: Any) -> bool:
    """Whether it is as it was written before 0.1.0, with all that is converted."""
    if not isinstance(value, dict) or not all(isinstance(value.get(part), dict) for part in ("promise", "measured")):
        return False
    thresholds = "patience" if value.get("policy") == "patience" else "thresholds"
    measured = ("pictures", "accuracy", "accuracy_of_last_exit", "cost", "harms", "corrections", "left_at")
    return isinstance(value.get("policy"), str) and thresholds in value and value["measured"].keys() >= {*measured}


def _is_encoded(digests: Any) -> bool:
    return isinstance(digests, str) and bool(re.fullmatch(r"([A-Za-z0-9+/]{8})*", digests))


_COUNT = (_is_count, "a whole number above 0")
_SIZE = (_is_size, "a side in pixels, above 0, or [height, width]")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_SHARE = (lambda value: _is_number(value, most=1.0), "a number from 0 to 1")
_NUMBER = (lambda value: _is_number(value) and math.isfinite(value), "a number of at least 0")
# What a field must be, and the words for it: of what is given in Python, and of what a config.json holds.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "exit_layers": (lambda value: isinstance(value, list | tuple | range), "a list of layer numbers, ascending"),
    "early_exit": _FLAG,
    "calibration": (
        lambda value: _is_calibration(value) or _is_older_calibration(value),
        "an object as `mevit calibrate` writes it",
    ),
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), _COUNT),
    "num_channels": _COUNT,
    "image_size": _SIZE,
    "patch_size": _SIZE,
    "qkv_bias": _FLAG,
    "hidden_act": (lambda value: isinstance(value, str) and value in ACT2FN, "the name of an activation, as 'gelu'"),
    "layer_norm_eps": _NUMBER,
    "initializer_range": _NUMBER,
    "hidden_dropout_prob": _SHARE,
    "attention_probs_dropout_prob": _SHARE,
    "id2label": (
        lambda value: value is None or (isinstance(value, dict) and all(str(key).isdigit() for key in value)),
        "an object from class numbers to names",
    ),
    "label2id": (lambda value: value is None or isinstance(value, dict), "an object from names to class numbers"),
    "dtype": (_is_dtype, "the name of a precision, as 'float32'"),
    "torch_dtype": (_is_dtype, "the name of a precision, as 'float32'"),
}


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for the first of some fields that is not of its kind."""
    for name, (is_allowed, allowed) in _FIELDS.items():
        if name in fields and not is_allowed(fields[name]):
            raise ValueError(f"{name} must be {allowed}, got {fields[name]!r:.200}.")


def _check_grid(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> None:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    patches = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if any(side <= 0 or side % patch for side, patch in zip(sides, patches, strict=True)):
        raise ValueError(f"image_size must be a positive multiple of patch_size={patch_size}, got {image_size}.")


def _without_retired_fields(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A config as it is written today, from one that may be of the time before 0.1.0."""
    fields = dict(config_dict)
    if not fields.pop("share_uncertainty_predictor", True) or fields.get("uncertainty_input") == "hidden_state":
        raise ValueError(
            "uncertainty predictors of single exits and on hidden states were retired; train the model again with "
            f"uncertainty_input={UNCERTAINTY_INPUTS[0]!r}."
        )
    fields.pop("uncertainty_target", None)
    num_exits = len(fields.get("exit_layers") or _default_exit_layers(fields.get("num_hidden_layers", 12)))
    patience = fields.pop("patience", None)
    if patience is not None and fields.get("exit_policy") == "patience":
        fields["exit_thresholds"] = _patience_threshold(patience, num_exits)
    if "promise" in (fields.get("calibration") or {}):
        fields["calibration"] = _converted_calibration(fields["calibration"], num_exits)
    return fields


def _default_exit_layers(depth: int) -> list[int]:
    """The later half of the encoder."""
    return list(range(max(depth // 2, 1), depth + 1))


def _patience_threshold(patience: int, num_exits: int) -> float:
    """What lets samples leave after `patience` exits in a row that agree: midway between their score and the next."""
    return 1 - (patience - 0.5) / num_exits


def _converted_calibration(old: dict[str, Any], num_exits: int) -> dict[str, Any]:
    measured = old["measured"]
    if old["policy"] == "patience":
        thresholds = [_patience_threshold(old["patience"], num_exits)] * (num_exits - 1)
    else:
        thresholds = old["thresholds"]
    target = {name: value for name, value in old["promise"].items() if value is not None}
    operating_point = {
        "policy": old["policy"],
        "thresholds": thresholds,
        "num_samples": measured["pictures"],
        "accuracy": measured["accuracy"],
        "full_model_accuracy": measured["accuracy_of_last_exit"],
        "cost": measured["cost"],
        "harms": measured["harms"],
        "corrections": measured["corrections"],
        "exit_counts": measured["left_at"],
    }
    data = old.get("data")
    return {
        "target": target,
        "operating_point": operating_point,
        "data": data and {**data, "image_digests": ""},  # single images were not told apart then
    }


__all__ = ["MEViTConfig"]
