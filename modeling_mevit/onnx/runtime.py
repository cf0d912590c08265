# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported cascade for programs that have torch: it takes and returns what the PyTorch model does."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput

from .._extras import extras_named
from ..configuration_mevit import MEViTConfig, certificate_is_gone, is_certified, precision_mismatch
from ..exit_policy_mevit import combine_exits
from ..modeling_mevit import MEViTOutput
from .cascade_mevit import Cascade, Monitor, RunnableGraph, calibrated_precision, run


class MEViTCascade:
    """An exported cascade, called like [`MEViTForImageClassification`].

    So [`calibrate`] and [`evaluate`] take it too, and thresholds that are written into its `config` count.

    Args:
        cascade: the runtime.
        config: of the model that was exported.
    """

    device = torch.device("cpu")  # of what it takes and returns, whatever the graphs run on

    def __init__(self, cascade: Cascade, config: MEViTConfig):
        self.cascade = cascade
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        providers: str | Sequence[Any] | None = None,
        threads: int = 0,
        *,
        monitor: Monitor | None = None,
        backend: str | None = None,
        precision: str | None = None,
    ) -> "MEViTCascade":
        """Opens the directory that `mevit export --cascade` wrote. All arguments are those of [`Cascade`].

        Raises:
            MissingExtraError: where the backend is not installed.
            ValueError: what [`Cascade`] raises.
        """
        with extras_named("an export"):
            cascade = Cascade(directory, providers, threads, monitor=monitor, backend=backend, precision=precision)
        return cls(cascade, MEViTConfig.from_pretrained(directory))

    def __call__(
        self,
        pixel_values: Tensor | np.ndarray,
        early_exit: bool | None = None,
        exit_thresholds: Sequence[float] | float | None = None,
    ) -> MEViTOutput:
        """Classifies images (B, C, H, W).

        Returns:
            With early exit `logits` (B, L), `exit_layer` and `exit_score` (B,) of the exits taken, else the last
            exit's `logits`, every exit's own `exit_logits` (B, E, L), and `exit_scores` (B, E). `exit_uncertainty` is
            known only where it is the score.

        Raises:
            ValueError: where images have another shape or type, thresholds are missing or do not fit, or the config's
                exit policy or combination is not the one that was exported.
        """
        images = _as_array(pixel_values)
        exported = self.cascade.config["exit_policy"]
        if self.config.exit_policy != exported:
            raise ValueError(
                f"exit_policy must be {exported!r}, whose score was exported, got {self.config.exit_policy!r}; "
                f"calibrate the checkpoint for it and export that again."
            )
        combination = self.cascade.config.get("exit_combination", "none")
        if self.config.exit_combination != combination:
            raise ValueError(
                f"exit_combination must be {combination!r}, which was exported, got {self.config.exit_combination!r}; "
                f"export the checkpoint with it again."
            )
        if early_exit is None:
            early_exit = self.config.early_exit
        if early_exit:
            thresholds = self.config.resolve_exit_thresholds(exit_thresholds)
            output = self.cascade(images, early_exit=True, exit_thresholds=thresholds)
            return MEViTOutput(
                logits=torch.from_numpy(output.logits),
                exit_layer=torch.from_numpy(output.exit_layer),
                exit_score=torch.from_numpy(output.exit_score),
            )
        if exit_thresholds is not None:
            raise ValueError("exit_thresholds need early_exit=True; without it no sample leaves early.")
        exit_logits, exit_scores = map(torch.from_numpy, self.cascade.every_exit(images))
        return MEViTOutput(
            logits=combine_exits(combination, exit_logits)[:, -1],
            exit_logits=exit_logits,
            exit_scores=exit_scores,
            exit_uncertainty=exit_scores if exported == "uncertainty" else None,
        )

    @property
    def precision(self) -> str:
        """What it computes in, such as `"int8"`; thresholds fit scores of that precision alone."""
        return self.cascade.precision

    @property
    def certificate(self) -> dict[str, Any] | None:
        """What calibration certified, as [`MEViTForImageClassification.certificate`] tells it.

        None where nothing was certified, and, with a warning that says why, where the thresholds, the policy, the
        exits or the precision are not those of the calibration, or answers depend on the batch.
        """
        calibration = self.config.calibration
        if calibration is None or not is_certified(calibration):
            return None
        differing = self.config.calibration_mismatches()
        expected = calibrated_precision(self.config.to_dict(), self.cascade.made_for)
        if expected not in (None, self.precision):
            differing.append(precision_mismatch(self.precision, expected))
        if self.cascade.made_for == "int8-dynamic":
            differing.append("with int8-dynamic an answer depends on the images beside it")
        if differing:
            warnings.warn(certificate_is_gone(differing), stacklevel=2)
            return None
        return dict(calibration["target"])

    def made_for(self) -> dict[str, Any]:
        """What a calibration of this cascade holds for, as [`MEViTForImageClassification.made_for`] tells it, but for
        the weights, which are in its graphs."""
        return {**self.config.made_for(), "dtype": self.precision}

    def to_vit(self) -> "SingleGraph":
        """`model.onnx`, the plain ViT of the export: the last exit alone, in the same precision.

        Where exits are combined, it has their heads, and its logits are the last combination.

        Raises:
            ValueError: where the last exit was not exported.
        """
        if not (self.cascade.directory / "model.onnx").is_file():
            raise ValueError(f"{self.cascade.directory} has no model.onnx; export the last exit too.")
        return SingleGraph(self.cascade.open("model.onnx"))


class SingleGraph:
    """A graph that takes images to logits, called like an image classifier of Transformers."""

    device = MEViTCascade.device

    def __init__(self, graph: RunnableGraph):
        self.graph = graph

    def __call__(self, pixel_values: Tensor | np.ndarray) -> ImageClassifierOutput:
        """Images (B, C, H, W) → `logits` (B, L)."""
        logits = torch.from_numpy(run(self.graph, {"pixel_values": _as_array(pixel_values)})["logits"])
        return ImageClassifierOutput(logits=logits)  # type: ignore[arg-type]


def _as_array(pixel_values: Tensor | np.ndarray) -> np.ndarray:
    return pixel_values.cpu().float().numpy() if isinstance(pixel_values, Tensor) else pixel_values
