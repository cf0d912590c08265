# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-exit Vision Transformer: a ViT with a classifier and an uncertainty predictor on several encoder layers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import AutoConfig, ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_mevit import MEViTConfig, validate_config_fields
from .encoder_layer_mevit import (
    attention_outputs,
    encoder_layers,
    project_keys_values,
    layer_outputs,
    mlp_outputs,
    recorded_attentions,
)
from .exit_policy_mevit import agreement, exit_scores
from .loss_mevit import cross_entropy, uncertainty_loss, uncertainty_target


@dataclass
class MEViTOutput(ModelOutput):
    """What [`MEViTForImageClassification`] returns, for B samples, E exits and L labels.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned where `labels` are given):
            Equation 1 summed over the exits.
        logits (`torch.FloatTensor` of shape `(B, L)`):
            Logits of the last exit; with early exit, of the exit that each sample took.
        exit_layer (`torch.LongTensor` of shape `(B,)`, returned with early exit):
            Layer of the exit that each sample took.
        exit_logits (`torch.FloatTensor` of shape `(B, E, L)`, returned without early exit):
            Logits of every exit, in the order of `config.exit_layers`.
        exit_scores (`torch.FloatTensor` of shape `(B, E)`, returned without early exit):
            Score of every exit under `config.exit_policy`, float32, low where the exit is sure. None for
            `"patience"`, which has no score of a single exit.
        exit_uncertainty (`torch.FloatTensor` of shape `(B, E)`, returned without early exit):
            Predicted uncertainty of every exit, equation 3, in (0, 1).
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned with `output_hidden_states=True`):
            The embeddings and each layer's output, before the final norm: one more than layers, each (B, N, d).
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            Each layer's attention probabilities, (B, heads, N, N).
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    exit_layer: torch.LongTensor | None = None
    exit_logits: torch.FloatTensor | None = None
    exit_scores: torch.FloatTensor | None = None
    exit_uncertainty: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class MEViTExit(nn.Module):
    """Layer norm and classifier on the [CLS] state of one encoder layer, (B, d) → (B, L).

    The last exit has no norm of its own, since the backbone's final layer norm is already applied to what it reads.
    """

    def __init__(self, config: MEViTConfig, is_last: bool):
        super().__init__()
        self.norm = nn.Identity() if is_last else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, cls_state: Tensor) -> tuple[Tensor, Tensor]:
        """[CLS] state (B, d) → the normalised state (B, d) and the logits (B, L)."""
        state = self.norm(cls_state)
        return state, self.classifier(state)


class MEViTUncertaintyPredictor(nn.Module):
    """Equation 3, `u_i = σ(wᵀ z_i + b)`, where z_i is what `config.uncertainty_input` says.

    `weight` is (1, size of z) where the exits share w and b, else (E, size of z).
    """

    def __init__(self, config: MEViTConfig):
        super().__init__()
        self.input = config.uncertainty_input
        size = config.hidden_size if self.input == "hidden_state" else config.num_labels
        predictors = 1 if config.share_uncertainty_predictor else len(config.exit_layers)
        self.weight = nn.Parameter(torch.zeros(predictors, size))
        self.bias = nn.Parameter(torch.zeros(predictors))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Small random weights. On probabilities it starts as a function of the largest one that falls to 0.12.

        Probabilities are never negative, so that while all uncertainties are large, as at the start, training raises
        every weight alike; from there it takes long until a sure exit gets a smaller number than an unsure one.
        """
        nn.init.trunc_normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)
        if self.input == "probabilities":
            self.weight[:, 0] -= 4
            self.bias += 2

    def forward(self, exit_states: Tensor, exit_logits: Tensor, exits: slice = slice(None)) -> Tensor:
        """Uncertainty (B, E) of the exits whose normalised states (B, E, d) and logits (B, E, L) are given.

        Where these are not all exits, `exits` says which ones.
        """
        if self.input == "logits":
            features = exit_logits
        elif self.input == "probabilities":
            features = exit_logits.softmax(-1).sort(-1, descending=True).values
        else:
            features = exit_states
        weight, bias = self.weight, self.bias
        if weight.shape[0] > 1:
            weight, bias = weight[exits], bias[exits]
        weight = weight.expand(features.shape[1], -1)
        return torch.sigmoid(torch.einsum("bed,ed->be", features, weight) + bias)


class MEViTForImageClassification(ViTPreTrainedModel):
    """A [`ViTModel`] with an exit on each layer of `config.exit_layers`.

    With one exit, on the last layer, this is a plain [`ViTForImageClassification`] with an uncertainty predictor.

    Example:

    ```python
    >>> from modeling_mevit import MEViTForImageClassification

    >>> model = MEViTForImageClassification.from_vit(
    ...     "google/vit-base-patch16-224-in21k", num_labels=196, image_size=448, exit_layers=[6, 9, 12]
    ... )
    >>> outputs = model(pixel_values)  # (B, 3, 448, 448)
    >>> outputs.exit_logits.shape  # (B, 3, 196)
    >>> small = model.truncate(6)  # half the layers, one exit
    ```
    """

    config_class = MEViTConfig
    # the batch mean is taken here, so a Trainer has to divide by its accumulation steps itself
    accepts_loss_kwargs = False

    def __init__(self, config: MEViTConfig):
        config.check()
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.exits = nn.ModuleDict(
            {str(layer): MEViTExit(config, is_last=layer == config.num_hidden_layers) for layer in config.exit_layers}
        )
        self.uncertainty = MEViTUncertaintyPredictor(config)
        # A setting of the training, not of the model: whether equation 2 moves more than the predictor itself.
        self.uncertainty_reaches_backbone = True
        self.post_init()

    @can_return_tuple
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
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`):
                Images of `config.image_size`, as the image processor gives them.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                Class indices in 0 … L − 1. The loss is equation 1 summed over all exits.
            early_exit (`bool`, *optional*):
                Whether each sample leaves at its first exit whose score is under that exit's threshold, and later
                layers run on the samples that go on alone. Defaults to `config.early_exit`, which is ignored in
                training mode, where labels, hidden states or attentions are asked for, and while the model is traced,
                compiled or exported: such a record would keep the path of one batch.
            exit_thresholds (`float` or E − 1 of them, *optional*):
                Thresholds of the early exits' scores; one number serves all exits. Defaults to
                `config.exit_thresholds`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to fit the position embeddings to images of another size; needs a square stored grid.
            output_hidden_states (`bool`, *optional*):
                Whether to return every layer's output. Defaults to the config's.
            output_attentions (`bool`, *optional*):
                Whether to return the attention probabilities; needs `attn_implementation="eager"`. Defaults to the
                config's.

        Raises:
            ValueError: where images have another size than the model, a label is out of range, an option needs
                what the model has not, or `early_exit=True` cannot be had; the message names it.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager'; "
                f"the model was loaded with {config._attn_implementation!r}, which keeps no attention probabilities."
            )
        rows, columns = patch_grid(config)
        if interpolate_pos_encoding and rows != columns:
            raise ValueError(
                f"interpolate_pos_encoding=True needs position embeddings of a square grid; "
                f"this model's are for image_size={config.image_size} and patch_size={config.patch_size}."
            )
        obstacle = (
            "in training mode"
            if self.training
            else "with labels"
            if labels is not None
            else "with output_hidden_states"
            if output_hidden_states
            else "with output_attentions"
            if output_attentions
            else "while the model is traced, compiled or exported"
            if _is_recorded()
            else None
        )
        if early_exit and obstacle:
            raise ValueError(f"early_exit=True cannot be had {obstacle}; all exits are computed there.")
        if early_exit is None:
            early_exit = config.early_exit and not obstacle
        if exit_thresholds is not None and not early_exit:
            raise ValueError("exit_thresholds are for early_exit=True; without it no sample leaves early.")

        pixel_values = pixel_values.to(self.vit.embeddings.patch_embeddings.projection.weight.dtype)
        if early_exit:
            thresholds = config.resolve_exit_thresholds(exit_thresholds)
            # no name here for the embeddings, which would keep them in memory to the end
            return self._leave_early(
                self.vit.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding), thresholds
            )
        hidden_state = self.vit.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)

        hidden_states = [hidden_state] if output_hidden_states else []
        exit_states, exit_logits = [], []
        layers = encoder_layers(self.vit)
        full_last_layer = self.training or output_hidden_states or output_attentions
        with recorded_attentions(layers if output_attentions else ()) as attentions:
            for number, layer in enumerate(layers, start=1):
                # hooks belong to the whole layer; what shards weights gathers them there
                if number < len(layers) or full_last_layer or layer._forward_hooks or layer._forward_pre_hooks:
                    hidden_state = layer(hidden_state)  # (B, N, d)
                else:
                    hidden_state, _ = _cls_row(layer, hidden_state)  # (B, 1, d)
                if output_hidden_states:
                    hidden_states.append(hidden_state)
                if number in config.exit_layers:
                    state, logits = self._exit(number, hidden_state[:, 0])
                    exit_states.append(state)
                    exit_logits.append(logits)

        exit_states = torch.stack(exit_states, dim=1)  # (B, E, d)
        exit_logits = torch.stack(exit_logits, dim=1)  # (B, E, L)
        if self.uncertainty_reaches_backbone:
            exit_uncertainty = self.uncertainty(exit_states, exit_logits)  # (B, E)
        else:
            exit_uncertainty = self.uncertainty(exit_states.detach(), exit_logits.detach())
        loss = None
        if labels is not None:
            loss = cross_entropy(exit_logits, labels).sum()
            target = uncertainty_target(exit_logits, labels, config.uncertainty_target)
            loss = loss + uncertainty_loss(exit_uncertainty, target).sum()

        return MEViTOutput(
            loss=loss,
            logits=exit_logits[:, -1],
            exit_logits=exit_logits,
            exit_scores=exit_scores(config.exit_policy, exit_logits, exit_uncertainty),
            exit_uncertainty=exit_uncertainty,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _leave_early(self, hidden_state: Tensor, thresholds: list[float]) -> MEViTOutput:
        """Runs the embeddings (B, N, d) through the layers; at each exit, samples that are sure enough leave."""
        config = self.config
        samples = torch.arange(len(hidden_state), device=hidden_state.device)  # which ones are still in the batch
        if not len(samples):
            return MEViTOutput(logits=hidden_state.new_empty(0, config.num_labels), exit_layer=samples)
        predictions = samples.new_empty(len(samples), 0)  # theirs at the exits so far, for patience
        left: list[Tensor] = []
        left_logits: list[Tensor] = []
        left_layers: list[Tensor] = []
        for number, layer in enumerate(encoder_layers(self.vit), start=1):
            if number not in config.exit_layers:
                hidden_state = layer(hidden_state)
                continue

            place = config.exit_layers.index(number)
            cls_row, (normed, keys, values) = _cls_row(layer, hidden_state)
            state, logits = self._exit(number, cls_row[:, 0])
            if number == config.exit_layers[-1]:
                leaves = torch.ones_like(samples, dtype=torch.bool)
            elif config.exit_policy == "patience":
                predictions = torch.cat((predictions, logits.argmax(-1, keepdim=True)), dim=1)
                leaves = agreement(predictions)[:, -1] >= config.patience
            else:
                uncertainty = self.uncertainty(state[:, None], logits[:, None], slice(place, place + 1))
                leaves = exit_scores(config.exit_policy, logits[:, None], uncertainty)[:, 0] < thresholds[place]

            if leaves.any():
                left.append(samples[leaves])
                left_logits.append(logits[leaves])
                left_layers.append(torch.full_like(left[-1], number))
                if len(left[-1]) == len(samples):
                    break
                stays = ~leaves
                samples, predictions = samples[stays], predictions[stays]
                hidden_state, normed, cls_row = hidden_state[stays], normed[stays], cls_row[stays]
                keys, values = keys[stays], values[stays]
            hidden_state = attention_outputs(layer, hidden_state[:, 1:], normed[:, 1:], keys, values)
            del normed, keys, values  # the MLP takes the most memory of a layer, and needs none of them
            hidden_state = torch.cat((cls_row, mlp_outputs(layer, hidden_state)), dim=1)

        in_order = torch.cat(left).argsort()
        return MEViTOutput(logits=torch.cat(left_logits)[in_order], exit_layer=torch.cat(left_layers)[in_order])

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MEViTUncertaintyPredictor):
            module.reset_parameters(self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, use_safetensors=True, **kwargs):
        """The library's `from_pretrained`, of checkpoints of this type and of safetensors only.

        Raises:
            ValueError: where the checkpoint holds another kind of model, or pickled weights are asked for.
        """
        if not use_safetensors:
            raise ValueError("use_safetensors=False would unpickle weights; allowed is True.")
        if config is None:
            download = {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if name in kwargs}
            described, _ = MEViTConfig.get_config_dict(pretrained_model_name_or_path, **download)
            _check_type(pretrained_model_name_or_path, described.get("model_type"), "mevit", "from_pretrained")
        return super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, use_safetensors=True, **kwargs
        )

    def _exit(self, number: int, cls_state: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised state (B, d) and logits (B, L) of exit `number`, from the [CLS] state (B, d) its layer gives."""
        if number == self.config.num_hidden_layers:
            cls_state = self.vit.layernorm(cls_state)
        return self.exits[str(number)](cls_state)

    @torch.no_grad()
    def truncate(self, exit_layer: int) -> "MEViTForImageClassification":
        """MEViT_k: a copy of the model cut at an exit, with `exit_layer` encoder layers and that one exit.

        Its weights are those of this model (copied), its exit's norm becomes the backbone's final one, and it is an
        ordinary model to run, save and push.

        Raises:
            ValueError: where the model has no exit after that layer.
        """
        if exit_layer not in self.config.exit_layers:
            raise ValueError(f"exit_layer={exit_layer} is no exit of this model; it has {self.config.exit_layers}.")
        model = copy.deepcopy(self)
        del encoder_layers(model.vit)[exit_layer:]
        own_exit = model.exits[str(exit_layer)]
        if exit_layer != self.config.num_hidden_layers:
            model.vit.layernorm, own_exit.norm = own_exit.norm, nn.Identity()
        model.exits = nn.ModuleDict({str(exit_layer): own_exit})
        if not self.config.share_uncertainty_predictor:
            row = self.config.exit_layers.index(exit_layer)
            predictor = model.uncertainty
            predictor.weight = nn.Parameter(predictor.weight[row : row + 1].clone())
            predictor.bias = nn.Parameter(predictor.bias[row : row + 1].clone())
        model.config.num_hidden_layers = exit_layer
        model.config.exit_layers, model.config.patience = [exit_layer], 1
        model.config.early_exit, model.config.exit_thresholds, model.config.calibration = False, None, None
        return model

    @classmethod
    def from_vit(
        cls,
        pretrained_model_name_or_path: str,
        *,
        image_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | str = torch.float32,
        **kwargs,
    ) -> "MEViTForImageClassification":
        """A multi-exit model on the weights of a pretrained ViT, ready for fine-tuning.

        The backbone's final layer norm starts the norm of every exit; classifiers and predictors are new.

        Args:
            pretrained_model_name_or_path (`str`):
                A local directory or the Hub name of any checkpoint of type `vit`, with or without a head.
            image_size (`int` or `(height, width)`, *optional*):
                Side of the images in pixels. Position embeddings are interpolated (bicubic, as the library's own
                ViT does) where it is not the checkpoint's.
            dtype (`torch.dtype` or its name, *optional*, defaults to `torch.float32`):
                Precision of the model, whatever the checkpoint's is.
            kwargs:
                Fields of [`MEViTConfig`] that differ from the checkpoint's (`num_labels`, `id2label`, `exit_layers`,
                `attn_implementation` …), and the library's `revision`, `token`, `cache_dir`, `subfolder`,
                `local_files_only` and `force_download`.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: where the checkpoint holds another kind of model or lacks some of the backbone's weights, or
                where a field is unknown or would need another backbone.
        """
        config, vit = read_vit(cls.config_class, pretrained_model_name_or_path, image_size=image_size, **kwargs)
        model = cls(config)
        load_backbone(model.vit, vit, grid=patch_grid(config))
        for layer in config.exit_layers[:-1]:
            model.exits[str(layer)].norm.load_state_dict(vit.layernorm.state_dict())
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).eval()


def _cls_row(layer: nn.Module, hidden_state: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The [CLS] row (B, 1, d) of a layer's output, and what the other rows need too."""
    shared = normed, keys, values = project_keys_values(layer, hidden_state)
    return layer_outputs(layer, hidden_state[:, :1], normed[:, :1], keys, values), shared


def _is_recorded() -> bool:
    """Whether the operations of this call are being written down, to be replayed on other images."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or get_proxy_mode() is not None


def _check_type(checkpoint: str, given: str, wanted: str, method: str) -> None:
    if given != wanted:
        other = "from_pretrained" if method == "from_vit" else "from_vit"
        hint = f" ({other} reads it)" if given in ("vit", "mevit") else ""
        raise ValueError(f"{checkpoint} holds a model of type {given!r}{hint}; {method} starts from type {wanted!r}.")


_DOWNLOAD_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
_SHAPE_OF_THE_BACKBONE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
# what a checkpoint says of itself, not of the backbone
_NOT_INHERITED = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path")


def read_vit(
    config_class: type[ViTConfig],
    pretrained_model_name_or_path: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    **kwargs,
) -> tuple[ViTConfig, ViTModel]:
    """A pretrained ViT, and the config of a model that starts from it; [`from_vit`] has the arguments and errors.

    Returns:
        A `config_class` with the fields of the checkpoint and of `kwargs`; the backbone, float32.
    """
    download = {name: kwargs.pop(name) for name in _DOWNLOAD_ARGUMENTS if name in kwargs}
    validate_config_fields(config_class, kwargs)
    vit_config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **download)
    _check_type(pretrained_model_name_or_path, vit_config.model_type, "vit", "from_vit")
    for name in _SHAPE_OF_THE_BACKBONE:
        if kwargs.get(name, getattr(vit_config, name)) != getattr(vit_config, name):
            raise ValueError(
                f"{name}={kwargs[name]} does not fit {pretrained_model_name_or_path}, "
                f"whose {name} is {getattr(vit_config, name)}."
            )
    settings = {name: value for name, value in vit_config.to_dict().items() if name not in _NOT_INHERITED}
    if "num_labels" in kwargs or "id2label" in kwargs:
        settings = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
    if image_size is not None:
        settings["image_size"] = image_size
    config = config_class(**{**settings, **kwargs})

    vit, loading = ViTModel.from_pretrained(
        pretrained_model_name_or_path,
        config=vit_config,
        add_pooling_layer=False,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        **download,
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacking = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
        raise ValueError(f"{pretrained_model_name_or_path} lacks weights of the backbone: {', '.join(lacking)}.")
    return config, vit


def load_backbone(backbone: ViTModel, vit: ViTModel, grid: tuple[int, int]) -> None:
    """Copies the weights of `vit` into `backbone`, whose patches make a grid of so many rows and columns."""
    weights = vit.state_dict()
    position_key = "embeddings.position_embeddings"
    weights[position_key] = interpolate_position_embeddings(
        weights[position_key], source=patch_grid(vit.config), target=grid
    )
    backbone.load_state_dict(weights)


def patch_grid(config: MEViTConfig) -> tuple[int, int]:
    """Rows and columns of patches in an image of `config.image_size`."""
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    patch_height, patch_width = (config.patch_size,) * 2 if isinstance(config.patch_size, int) else config.patch_size
    return height // patch_height, width // patch_width


def interpolate_position_embeddings(embeddings: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Position embeddings of [CLS] and a grid of patches, fitted to another grid.

    Args:
        embeddings: (1, 1 + rows · columns, d) for the source grid.
        source: rows and columns of the grid they were trained on.
        target: rows and columns wanted.

    Returns:
        (1, 1 + rows · columns, d) for the target grid; [CLS] unchanged, patches by bicubic interpolation.
    """
    if source == target:
        return embeddings
    cls_position, patch_positions = embeddings[:, :1], embeddings[:, 1:]
    grid = patch_positions.unflatten(1, source).permute(0, 3, 1, 2)  # (1, d, rows, columns)
    grid = nn.functional.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return torch.cat((cls_position, grid.flatten(2).transpose(1, 2)), dim=1)


__all__ = ["MEViTForImageClassification", "MEViTOutput"]
