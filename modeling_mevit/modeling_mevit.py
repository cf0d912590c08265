# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-exit Vision Transformer: a ViT with a classifier and an uncertainty predictor on several encoder layers."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, ViTModel, ViTPreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_mevit import MEViTConfig
from .exit_policy_mevit import exit_scores
from .loss_mevit import cross_entropy, uncertainty_loss, uncertainty_target


@dataclass
class MEViTOutput(ModelOutput):
    """What [`MEViTForImageClassification`] returns, for B samples, E exits and L labels.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned where `labels` are given):
            Equation 1 summed over the exits.
        logits (`torch.FloatTensor` of shape `(B, L)`):
            Logits of the last exit.
        exit_logits (`torch.FloatTensor` of shape `(B, E, L)`):
            Logits of every exit, in the order of `config.exit_layers`.
        exit_scores (`torch.FloatTensor` of shape `(B, E)`):
            Score of every exit under `config.exit_policy`, float32, low where the exit is sure.
        exit_uncertainty (`torch.FloatTensor` of shape `(B, E)`):
            Predicted uncertainty of every exit, equation 3, in (0, 1).
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned with `output_hidden_states=True`):
            The embeddings and each layer's output, before the final norm: one more than layers, each (B, N, d).
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            Each layer's attention probabilities, (B, heads, N, N).
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    exit_logits: torch.FloatTensor | None = None
    exit_scores: torch.FloatTensor | None = None
    exit_uncertainty: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def encoder_layers(vit: ViTModel) -> nn.ModuleList:
    """The encoder layers of a [`ViTModel`], which Transformers 4 and 5 keep under different names."""
    return vit.layers if hasattr(vit, "layers") else vit.encoder.layer


def self_attention(layer: nn.Module) -> nn.Module:
    """The part of an encoder layer that returns (context, attention probabilities)."""
    return getattr(layer.attention, "attention", layer.attention)


class MEViTExit(nn.Module):
    """Layer norm and classifier on the [CLS] state of one encoder layer, (B, d) → (B, L).

    The last exit has no norm of its own, since the backbone's final layer norm is already applied to what it reads.
    """

    def __init__(self, config: MEViTConfig, is_last: bool):
        super().__init__()
        self.norm = nn.Identity() if is_last else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, cls_state: Tensor) -> Tensor:
        return self.classifier(self.norm(cls_state))


class MEViTUncertaintyPredictor(nn.Module):
    """Equation 3, `u_i = σ(wᵀ f_i(h_i) + b)`, from the logits (B, E, L) of all exits to (B, E).

    `weight` is (1, L) where the exits share w and b, else (E, L).
    """

    def __init__(self, config: MEViTConfig):
        super().__init__()
        predictors = 1 if config.share_uncertainty_predictor else len(config.exit_layers)
        self.weight = nn.Parameter(torch.zeros(predictors, config.num_labels))
        self.bias = nn.Parameter(torch.zeros(predictors))

    def forward(self, exit_logits: Tensor) -> Tensor:
        weight = self.weight.expand(exit_logits.shape[1], -1)  # (E, L)
        return torch.sigmoid(torch.einsum("bel,el->be", exit_logits, weight) + self.bias)


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
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MEViTOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`):
                Pictures of `config.image_size`, as the image processor gives them.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                Class indices in 0 … L − 1. The loss is equation 1 summed over all exits.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to fit the position embeddings to pictures of another size; needs a square stored grid.
            output_hidden_states (`bool`, *optional*):
                Whether to return every layer's output. Defaults to the config's.
            output_attentions (`bool`, *optional*):
                Whether to return the attention probabilities; needs `attn_implementation="eager"`. Defaults to the
                config's.

        Raises:
            ValueError: where pictures have another size than the model, a label is out of range, or an option needs
                what the model has not; the message names it.
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

        pixel_values = pixel_values.to(self.vit.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_state = self.vit.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_states = [hidden_state] if output_hidden_states else []
        attentions: list[Tensor] = []
        exit_logits = []
        layers = encoder_layers(self.vit)
        hooks = [
            self_attention(layer).register_forward_hook(lambda module, args, output: attentions.append(output[1]))
            for layer in layers
            if output_attentions
        ]
        try:
            for number, layer in enumerate(layers, start=1):
                hidden_state = layer(hidden_state)  # (B, N, d)
                if output_hidden_states:
                    hidden_states.append(hidden_state)
                if number in config.exit_layers:
                    exit_logits.append(self._exit(number, hidden_state[:, 0]))
        finally:
            for hook in hooks:
                hook.remove()

        exit_logits = torch.stack(exit_logits, dim=1)  # (B, E, L)
        exit_uncertainty = self.uncertainty(
            exit_logits if self.uncertainty_reaches_backbone else exit_logits.detach()
        )  # (B, E)
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

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MEViTUncertaintyPredictor):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)

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

    def _exit(self, number: int, cls_state: Tensor) -> Tensor:
        """Logits (B, L) of exit `number` from the [CLS] state (B, d) that its layer gives."""
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
        model.config.exit_layers = [exit_layer]
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
                Side of the pictures in pixels. Position embeddings are interpolated (bicubic, as the library's own
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
        download = {name: kwargs.pop(name) for name in _DOWNLOAD_ARGUMENTS if name in kwargs}
        cls.config_class.check_names(kwargs)
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
        config = cls.config_class(**{**settings, **kwargs})

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

        weights = vit.state_dict()
        position_key = "embeddings.position_embeddings"
        weights[position_key] = interpolate_position_embeddings(
            weights[position_key], source=patch_grid(vit_config), target=patch_grid(config)
        )
        model = cls(config)
        model.vit.load_state_dict(weights)
        for layer in config.exit_layers[:-1]:
            model.exits[str(layer)].norm.load_state_dict(vit.layernorm.state_dict())
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).eval()


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


def patch_grid(config: MEViTConfig) -> tuple[int, int]:
    """Rows and columns of patches in a picture of `config.image_size`."""
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
