# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-exit Vision Transformer: a ViT with a classifier and an uncertainty predictor on several encoder layers.

B samples, E exits in ascending order (the last one is the last encoder layer's), L labels, N tokens of width d.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel, ViTPreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_mevit import MEViTConfig, certificate_is_gone, is_certified, precision_mismatch
from .encoder_layer_mevit import (
    attention_outputs,
    encoder_layers,
    layer_outputs,
    mlp_outputs,
    project_keys_values,
    recorded_attentions,
    runs_whole,
)
from .exit_policy_mevit import NO_LABEL, combine_exit, combine_exits, exit_labels, exit_scores, patience_score
from .loss_mevit import cross_entropy, uncertainty_loss, uncertainty_target
from .vit_backbone_mevit import load_backbone, patch_grid, read_vit


try:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
except ImportError:  # it is not of PyTorch's public interface, and checkpoints outlive releases

    def get_proxy_mode() -> None:  # type: ignore[misc]
        return None


@dataclass
class MEViTOutput(ModelOutput):
    """What [`MEViTForImageClassification`] returns.

    In eval mode `logits`, `exit_scores` and `exit_uncertainty` are those of what an exit predicts with, which
    `config.exit_combination` says. Losses, and everything in training mode, are of each exit's own logits.

    Args:
        loss: (), with `labels`: equation 1 summed over the exits.
        logits: (B, L), of the last exit; with early exit, of the exit that each sample took. Float32 under `"mean"`.
        exit_layer: (B,), int64, with early exit: layer of the exit that each sample took.
        exit_score: (B,), float32, with early exit: score of that exit under `config.exit_policy`.
        exit_logits: (B, E, L), without early exit: every exit's own, in the order of `config.exit_layers`;
            [`combine_exits`] makes of them what the exits predict with.
        exit_scores: (B, E), float32, without early exit: score of every exit under `config.exit_policy`, low if it is
            sure.
        exit_uncertainty: (B, E), float32, without early exit: predicted uncertainty of every exit, equation 3, in
            (0, 1). None where the predictor cannot read the combination (`config.predicts_uncertainty`).
        hidden_states: with `output_hidden_states=True`: the embeddings and each layer's output, before the final norm,
            one more than layers, each (B, N, d).
        attentions: with `output_attentions=True`: each layer's attention probabilities, (B, heads, N, N).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    exit_score: Tensor | None = None
    exit_logits: Tensor | None = None
    exit_scores: Tensor | None = None
    exit_uncertainty: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MEViTExit(nn.Module):
    """Layer norm and classifier on the [CLS] state of one encoder layer, (B, d) → (B, L).

    The last exit has no norm of its own, since the backbone's final layer norm is already applied to what it reads.
    """

    def __init__(self, config: MEViTConfig, is_last: bool) -> None:
        super().__init__()
        self.norm = nn.Identity() if is_last else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, cls_state: Tensor) -> Tensor:
        """[CLS] state (B, d) → logits (B, L)."""
        logits: Tensor = self.classifier(self.norm(cls_state))
        return logits


class MEViTUncertaintyPredictor(nn.Module):
    """Equation 3, `u_i = σ(wᵀ z_i + b)`, one `weight` (1, L) and `bias` (1,) for all exits.

    z_i is what `config.uncertainty_input` says: the exit's logits, or its softmax in descending order.
    """

    def __init__(self, config: MEViTConfig) -> None:
        super().__init__()
        self.input = config.uncertainty_input
        self.weight = nn.Parameter(torch.zeros(1, config.num_labels))
        self.bias = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Small random weights. On probabilities it starts as a function of the largest one that falls to 0.12.

        Probabilities are never negative, so that while all uncertainties are large, as at the start, training raises
        every weight alike; from there it takes long until a sure exit gets a smaller number than an unsure one.
        """
        reads_probabilities = self.input == "probabilities"
        nn.init.trunc_normal_(self.weight, std=std)
        nn.init.constant_(self.bias, 2.0 if reads_probabilities else 0.0)
        if reads_probabilities:
            self.weight[:, 0] -= 4

    def forward(self, exit_logits: Tensor) -> Tensor:
        """Logits (B, E, L) of any exits, or their combination → their uncertainty (B, E), float32.

        Like every score it is computed in float32, whatever the model's precision: bfloat16 has only 128 numbers from
        0.5 to 1, where the probabilities of sure exits are.
        """
        features = exit_logits.float()
        if self.input == "probabilities":
            features = features.softmax(-1).sort(-1, descending=True).values
        weight = self.weight.float().expand(features.shape[1], -1)
        device_type = features.device.type
        with torch.autocast(device_type, enabled=False) if _autocast_dtype(device_type) else nullcontext():
            return torch.sigmoid(torch.einsum("bed,ed->be", features, weight) + self.bias.float())


class MEViTForImageClassification(ViTPreTrainedModel):
    """A [`ViTModel`] with an exit on each layer of `config.exit_layers`.

    With one exit, on the last layer, this is a plain [`ViTForImageClassification`] with an uncertainty predictor.

    Example:

    ```python
    >>> import torch
    >>> from modeling_mevit import MEViTConfig, MEViTForImageClassification

    >>> config = MEViTConfig(
    ...     hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
    ...     image_size=16, patch_size=4, num_labels=5, exit_layers=[2, 3, 4],
    ... )
    >>> model = MEViTForImageClassification(config).eval()
    >>> pixel_values = torch.zeros(6, 3, 16, 16)
    >>> outputs = model(pixel_values)
    >>> outputs.exit_logits.shape, outputs.exit_scores.shape
    (torch.Size([6, 3, 5]), torch.Size([6, 3]))
    >>> model(pixel_values, early_exit=True, exit_thresholds=1.0).exit_layer
    tensor([2, 2, 2, 2, 2, 2])
    >>> small = model.truncate(2)  # half the layers, one exit
    >>> small.config.exit_layers
    [2]

    ```
    """

    config: MEViTConfig
    # the batch mean is taken here, so a Trainer has to divide by its accumulation steps itself
    accepts_loss_kwargs = False
    # whether the last exit's classifier is that of the checkpoint that `from_vit` started from
    starts_with_classifier = False
    _no_split_modules = [*ViTPreTrainedModel._no_split_modules, "MEViTExit", "MEViTUncertaintyPredictor"]
    # an exit's layer calls its attention for [CLS] alone; only these two are tested to give the same there
    _supports_flash_attn = False
    _supports_flash_attn_2 = False
    _supports_flex_attn = False

    def __init__(self, config: MEViTConfig) -> None:
        config.validate()
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.exits = nn.ModuleDict(
            {str(layer): MEViTExit(config, is_last=layer == config.num_hidden_layers) for layer in config.exit_layers}
        )
        self.uncertainty = MEViTUncertaintyPredictor(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        early_exit: bool | None = None,
        exit_thresholds: Sequence[float] | float | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MEViTOutput:
        """Classifies images at every exit, or each at the first exit that is sure enough.

        Args:
            pixel_values: (B, C, H, W), images of `config.image_size`, as the image processor gives them.
            labels: (B,), int64, class indices in 0 … L − 1. The loss is equation 1 summed over all exits.
            early_exit: whether each sample leaves at its first exit whose score is under that exit's threshold; later
                layers then run on the remaining samples alone. Defaults to `config.early_exit`, which is ignored in
                training mode, with labels, hidden states or attentions, and while the model is traced, compiled or
                exported, which would keep the path of one batch.
            exit_thresholds: of the early exits' scores: E − 1 numbers, or one for all. Defaults to
                `config.exit_thresholds`.
            interpolate_pos_encoding: whether to fit the position embeddings to images of another size; needs a square
                stored grid.
            output_hidden_states: whether to return every layer's output. Defaults to the config's.
            output_attentions: whether to return the attention probabilities; needs `attn_implementation="eager"`.
                Defaults to the config's.

        Returns:
            [`MEViTOutput`], or with `return_dict=False` a tuple of those fields that are not None.

        Raises:
            ValueError: if images have another size than the model, a label is out of range, or an option is not
                supported together with another or by this model; the message names it.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager', got {config._attn_implementation!r}, "
                f"which keeps no attention probabilities."
            )
        reason = self._reason_against_early_exit(labels, output_hidden_states, output_attentions)
        if early_exit and reason:
            raise ValueError(f"early_exit=True is not supported {reason}, where all exits are computed.")
        if early_exit is None:
            early_exit = config.early_exit and not reason
        if exit_thresholds is not None and not early_exit:
            raise ValueError("exit_thresholds need early_exit=True; without it no sample leaves early.")

        if early_exit:
            thresholds = config.resolve_exit_thresholds(exit_thresholds)
            are_calibrated = exit_thresholds is None and config.calibration is not None
            if are_calibrated and (warning := config.precision_warning(self.precision)):
                warnings.warn(warning, stacklevel=2)
            return self._leave_early(self._embed(pixel_values, interpolate_pos_encoding), thresholds)

        exit_logits, hidden_states, attentions = self._run_all_exits(
            self._embed(pixel_values, interpolate_pos_encoding), output_hidden_states, output_attentions
        )
        # in training mode each exit stands by itself
        combination = "none" if self.training else config.exit_combination
        combined = combine_exits(combination, exit_logits)  # (B, E, L)
        exit_uncertainty: Any = None  # (B, E)
        if combination == "none" or config.predicts_uncertainty:
            exit_uncertainty = self.uncertainty(combined).to(combined.device)
        loss = None
        if labels is not None:
            labels = labels.to(exit_logits.device)
            is_own = combination == "none"
            own_uncertainty = exit_uncertainty if is_own else self.uncertainty(exit_logits).to(exit_logits.device)
            loss = cross_entropy(exit_logits, labels).sum()
            loss = loss + uncertainty_loss(own_uncertainty, uncertainty_target(exit_logits, labels)).sum()
        return MEViTOutput(
            loss=loss,
            logits=combined[:, -1],
            exit_logits=exit_logits,
            exit_scores=exit_scores(config.exit_policy, combined, exit_uncertainty),
            exit_uncertainty=exit_uncertainty,
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def _reason_against_early_exit(
        self, labels: Tensor | None, output_hidden_states: bool, output_attentions: bool
    ) -> str | None:
        """What needs all exits of all samples, in words that follow "not supported"."""
        if self.training:
            return "in training mode"
        if labels is not None:
            return "with labels"
        if output_hidden_states:
            return "with output_hidden_states"
        if output_attentions:
            return "with output_attentions"
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if is_tracing or torch.compiler.is_compiling() or get_proxy_mode() is not None:
            return "while the model is traced, compiled or exported"
        return None

    def _embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """Images (B, C, H, W) → the first layer's input (B, N, d)."""
        rows, columns = patch_grid(self.config)
        if interpolate_pos_encoding and rows != columns:
            raise ValueError(
                f"interpolate_pos_encoding=True needs position embeddings of a square grid; this model's are for "
                f"image_size={self.config.image_size} and patch_size={self.config.patch_size}."
            )
        embeddings = self.vit.embeddings
        pixel_values = pixel_values.to(embeddings.patch_embeddings.projection.weight.dtype)
        hidden_state: Tensor = embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return hidden_state

    def _run_all_exits(
        self, hidden_state: Tensor, output_hidden_states: bool, output_attentions: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Runs the embeddings (B, N, d) through all layers.

        Returns:
            Logits of every exit (B, E, L), on the last one's device; hidden states and attentions, if asked for.
        """
        layers = encoder_layers(self.vit)
        needs_last_layer = self.training or output_hidden_states or output_attentions
        hidden_states = [hidden_state] if output_hidden_states else []
        logits = []
        recording: AbstractContextManager[list[Tensor]] = nullcontext([])
        if output_attentions:
            recording = recorded_attentions(layers)
        with recording as attentions:
            for number, layer in enumerate(layers, start=1):
                if number < len(layers) or needs_last_layer or runs_whole(layer):
                    hidden_state = layer(hidden_state)  # (B, N, d)
                else:
                    hidden_state, _ = _cls_output(layer, hidden_state)  # (B, 1, d)
                if output_hidden_states:
                    hidden_states.append(hidden_state)
                if number in self.config.exit_layers:
                    logits.append(self._exit_logits(number, hidden_state[:, 0]))
        exit_logits = torch.stack([one.to(logits[-1].device) for one in logits], dim=1)
        return (
            exit_logits,
            tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def _leave_early(self, hidden_state: Tensor, thresholds: list[float]) -> MEViTOutput:
        """Runs the embeddings (B, N, d) through the layers; at each exit, samples that are sure enough leave."""
        config, device = self.config, hidden_state.device
        samples = torch.arange(len(hidden_state), device=device)  # which ones are still in the batch
        label = torch.full_like(samples, NO_LABEL)  # that the exit before predicted, and how many in a row did
        streak = torch.zeros_like(samples)
        # of the exits passed, summed
        log_probabilities = torch.zeros(len(samples), config.num_labels, dtype=torch.float32, device=device)
        if not len(samples):
            logits = hidden_state.new_empty(0, config.num_labels)
            logits, _ = combine_exit(config.exit_combination, logits, log_probabilities, num_exits=1)
            return MEViTOutput(logits=logits, exit_layer=samples, exit_score=samples.float())
        left: list[Tensor] = []
        left_logits: list[Tensor] = []
        left_layers: list[Tensor] = []
        left_scores: list[Tensor] = []
        computed = self._exits_that_count(thresholds)
        for number, layer in enumerate(encoder_layers(self.vit), start=1):
            if number not in computed:
                hidden_state = layer(hidden_state)
                continue

            is_whole = runs_whole(layer)
            if is_whole:
                hidden_state = layer(hidden_state)
                logits = self._exit_logits(number, hidden_state[:, 0])
            else:
                cls_output, (normed, keys, values) = _cls_output(layer, hidden_state)
                logits = self._exit_logits(number, cls_output[:, 0])
            place = config.exit_layers.index(number)
            logits, log_probabilities = combine_exit(
                config.exit_combination, logits.to(device), log_probabilities, num_exits=place + 1
            )

            if config.exit_policy == "patience":
                previous, label = label, exit_labels(logits)
                streak = torch.where(label == previous, streak + 1, 1)
            score = self._score(logits, streak)
            if number == config.num_hidden_layers:
                leaves = torch.ones_like(samples, dtype=torch.bool)
            else:
                # an exit whose logits are not all finite is never sure
                leaves = (score < thresholds[place]) & logits.isfinite().all(-1)

            if leaves.any():
                left.append(samples[leaves])
                left_logits.append(logits[leaves])
                left_layers.append(torch.full_like(left[-1], number))
                left_scores.append(score[leaves])
                if leaves.all():
                    break
                stays = ~leaves
                samples, label, streak = samples[stays], label[stays], streak[stays]
                log_probabilities = log_probabilities[stays]
                stays = stays.to(hidden_state.device)
                hidden_state = hidden_state[stays]
                if not is_whole:
                    cls_output, normed, keys, values = cls_output[stays], normed[stays], keys[stays], values[stays]
            if not is_whole:
                hidden_state = attention_outputs(layer, hidden_state[:, 1:], normed[:, 1:], keys, values)
                del normed, keys, values  # the MLP takes the most memory of a layer, and needs none of them
                hidden_state = torch.cat((cls_output, mlp_outputs(layer, hidden_state)), dim=1)

        in_order = torch.cat(left).argsort()
        return MEViTOutput(
            logits=torch.cat(left_logits)[in_order],
            exit_layer=torch.cat(left_layers)[in_order],
            exit_score=torch.cat(left_scores)[in_order],
        )

    def _exits_that_count(self, thresholds: list[float]) -> list[int]:
        """Layers of the exits that an early-exit run has to compute: those where a sample can leave, since no score is
        below 0; and all of them where an exit's answer depends on those before."""
        layers, config = self.config.exit_layers, self.config
        if config.exit_combination != "none" or config.exit_policy == "patience":
            return layers
        return [layer for layer, threshold in zip(layers, [*thresholds, 1.0], strict=True) if threshold > 0]

    def _exit_on(self, layer: int) -> MEViTExit:
        return cast(MEViTExit, self.exits[str(layer)])

    def _exit_logits(self, layer: int, cls_state: Tensor) -> Tensor:
        """Logits (B, L) of the exit on a layer, from the [CLS] state (B, d) that the layer gives."""
        if layer == self.config.num_hidden_layers:
            cls_state = self.vit.layernorm(cls_state)
        logits: Tensor = self._exit_on(layer)(cls_state)
        return logits

    def _score(self, logits: Tensor, streak: Tensor) -> Tensor:
        """Score (B,) of one exit, from the logits (B, L) that it predicts with, and how many exits in a row (B,)
        predict its label."""
        policy = self.config.exit_policy
        if policy == "patience":
            return patience_score(streak, num_exits=len(self.config.exit_layers))
        exit_logits = logits[:, None]
        uncertainty = self.uncertainty(exit_logits).to(logits.device) if policy == "uncertainty" else None
        return exit_scores(policy, exit_logits, uncertainty)[:, 0]

    @property
    def precision(self) -> str:
        """What it computes in: the precision of its weights, such as `"bfloat16"`, and, where that is turned on, what
        autocast computes in, such as `"float32 with autocast to bfloat16"`. Scores depend on both."""
        name, autocast = _name_of(self.dtype), _autocast_dtype(self.device.type)
        return f"{name} with autocast to {_name_of(autocast)}" if autocast else name

    @property
    def certificate(self) -> dict[str, Any] | None:
        """What calibration certified, such as `{"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": "harm",
        "guarantee": "probability"}`; in expectation, such as `{"max_disagreement": 0.01, "guarantee": "expectation"}`.
        Older checkpoints may leave out the guarantee that a confidence implies.

        None where nothing was certified, and, with a warning that says why, where the thresholds, the policy, the
        exits, their combination, fields of the architecture, the precision or the weights are not those of the
        calibration any more. Reads all weights, which takes about a second for a ViT-B.
        """
        calibration = self.config.calibration
        if calibration is None or not is_certified(calibration):
            return None
        differing = self.config.calibration_mismatches() + weight_mismatches(calibration, self.made_for())
        if differing:
            warnings.warn(certificate_is_gone(differing), stacklevel=2)
            return None
        target: dict[str, Any] = calibration["target"]
        return dict(target)

    def made_for(self) -> dict[str, Any]:
        """What a calibration of this model holds for, as `config.calibration["made_for"]` keeps it.

        Returns:
            `exit_layers`; `exit_combination`; `architecture`, the digest of [`MEViTConfig`]; `dtype`, the precision;
            and `weights`, their digest, or None where some are offloaded, so that it cannot be told.
        """
        # modules that were quantized in place have other things in their state too
        weights = {name: value for name, value in self.state_dict().items() if isinstance(value, Tensor)}
        is_here = not any(tensor.is_meta for tensor in weights.values())
        return {
            **self.config.made_for(),
            "dtype": self.precision,
            "weights": weights_digest(weights.items()) if is_here else None,
        }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[arg-type, unused-ignore]
        if isinstance(module, MEViTUncertaintyPredictor):
            module.reset_parameters(self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, use_safetensors: bool | None = None, **kwargs: Any
    ) -> Any:
        """Transformers' `from_pretrained`, of safetensors only.

        Raises:
            ValueError: if pickled weights are asked for.

        Warns:
            UserWarning: if thresholds were calibrated in another precision than the weights now have.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors must be True, got False, which would unpickle weights and so run code.")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if warning := model.config.precision_warning(_name_of(model.dtype), of_weights=True):
            warnings.warn(warning, stacklevel=2)
        return loaded

    @classmethod
    def from_vit(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        image_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | str = torch.float32,
        **kwargs: Any,
    ) -> "MEViTForImageClassification":
        """A multi-exit model on the weights of a pretrained ViT, ready for fine-tuning.

        The backbone's final layer norm starts the norm of every exit; the predictor and classifiers are new. But the
        last exit starts with the checkpoint's classifier if that is of a plain ViT, or of a MEViT with one exit, and
        for the same labels: its logits are then those of the checkpoint's own model. Labels are the same if they are
        not given, or if their names are equal and none of the placeholders `LABEL_0` and so on.

        Args:
            pretrained_model_name_or_path: a local directory or the Hub name of a checkpoint, with or without a head,
                of any type that `read_vit` reads.
            image_size: side of the images in pixels, or `(height, width)`. Position embeddings are interpolated
                (bicubic, as Transformers' own ViT does) if it is not the checkpoint's.
            dtype: precision of the model, or its name, whatever the checkpoint's is.
            kwargs: fields of [`MEViTConfig`] that differ from the checkpoint's (`num_labels`, `id2label`,
                `exit_layers`, `attn_implementation` …), and Transformers' `revision`, `token`, `cache_dir`,
                `subfolder`, `local_files_only` and `force_download`.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if the checkpoint holds another kind of model, one with several exits, or lacks some of the
                backbone's weights, or if a field is unknown or would need another backbone.
        """
        config, vit, classifier = read_vit(MEViTConfig, pretrained_model_name_or_path, image_size=image_size, **kwargs)
        model = cls(config)
        load_backbone(model.vit, vit, grid=patch_grid(config))
        for layer in config.exit_layers[:-1]:
            model._exit_on(layer).norm.load_state_dict(vit.layernorm.state_dict())
        if classifier is not None:
            model._exit_on(config.num_hidden_layers).classifier.load_state_dict(classifier.state_dict())
            model.starts_with_classifier = True
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # type: ignore[arg-type]
        model.train(False)
        return model

    def to_vit(self) -> ViTForImageClassification:
        """The plain ViT that shares the weights of the backbone and the last exit; nothing is copied."""
        fields = ViTConfig().to_dict().keys() - {"model_type"}
        settings = {name: value for name, value in self.config.to_dict().items() if name in fields}
        config = ViTConfig(**settings, attn_implementation=self.config._attn_implementation)
        with torch.device("meta"):
            plain = ViTForImageClassification(config)
        plain.vit = self.vit
        plain.classifier = self._exit_on(self.config.num_hidden_layers).classifier
        plain.train(self.training)
        return plain

    def truncate(self, exit_layer: int, *, copy: bool = True) -> "MEViTForImageClassification":
        """MEViT_k: the model cut at an exit, with `exit_layer` encoder layers and that one exit.

        Where exits are combined, it keeps the earlier ones too, since that exit predicts with them.

        Its weights are those of this model, its exit's norm becomes the backbone's final one, and it is an ordinary
        model to run, save and push.

        Args:
            exit_layer: layer of the exit.
            copy: whether to copy the weights that it keeps; without, both models share them.

        Raises:
            ValueError: if the model has no exit after that layer.
        """
        if exit_layer not in self.config.exit_layers:
            raise ValueError(f"layer {exit_layer} has no exit; the model has exits on {self.config.exit_layers}.")
        config = deepcopy(self.config)
        passed = [layer for layer in self.config.exit_layers if layer <= exit_layer]
        config.num_hidden_layers = exit_layer
        config.exit_layers = passed[-1:] if config.exit_combination == "none" else passed
        config.early_exit, config.exit_thresholds, config.calibration = False, None, None
        with torch.device("meta"):
            model = type(self)(config)
        weights = self.state_dict()
        if exit_layer != self.config.num_hidden_layers:
            for name in ("weight", "bias"):
                weights[f"vit.layernorm.{name}"] = weights[f"exits.{exit_layer}.norm.{name}"]
        kept = {name: weights[name] for name in model.state_dict()}
        model.load_state_dict({name: kept[name].clone() for name in kept} if copy else kept, assign=True)
        model.train(self.training)
        return model


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, shortened, of weights by name, precision, shape and bytes, whatever their order.

    Args:
        weights: of `state_dict()` or of a `model.safetensors`, whose names differ with Transformers' major version 5.
    """
    digests = []
    for name, tensor in weights:
        for pattern, written in _WRITTEN_NAMES:
            name = re.sub(pattern, written, name)
        described = hashlib.sha256(f"{name} {_name_of(tensor.dtype)} {list(tensor.shape)} ".encode())
        described.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.append(described.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def weight_mismatches(calibration: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs in precision or weights from what a calibration was made for; empty where nothing does.

    Args:
        calibration: of a config.
        found: `dtype` and `weights`, as `MEViTForImageClassification.made_for` gives them.
    """
    made_for = calibration.get("made_for") or {}
    if made_for.get("weights") is None:
        return ["the calibration does not say which weights it was made for"]
    if made_for.get("dtype") != found["dtype"]:
        return [precision_mismatch(found["dtype"], made_for.get("dtype"))]
    if found["weights"] is None:
        return ["some weights are offloaded, so that it cannot be told whether they are those of the calibration"]
    return [] if made_for["weights"] == found["weights"] else ["the weights are different ones"]


# from names in memory to those on disk; both majors write the same ones
_WRITTEN_NAMES = (
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on a type of device; None where it is off."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cls_output(layer: nn.Module, hidden_state: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A layer's output for [CLS] (B, 1, d), and what the other tokens need too."""
    shared = normed, keys, values = project_keys_values(layer, hidden_state)
    return layer_outputs(layer, hidden_state[:, :1], normed[:, :1], keys, values), shared


__all__ = ["MEViTForImageClassification", "MEViTOutput"]
