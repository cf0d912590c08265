# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""From pretrained checkpoints of several types to the backbone of a multi-exit ViT."""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Dinov2Model, ViTConfig, ViTForImageClassification, ViTMAEModel, ViTModel, ViTMSNModel

from .configuration_mevit import MEViTConfig, validate_config_fields
from .encoder_layer_mevit import encoder_layers, layer_parts


Config = TypeVar("Config", bound=ViTConfig)

# Any, since Transformers' annotations do not know what output_loading_info=True returns.
_MODELS: dict[str, Any] = {
    "vit": ViTModel,
    "mevit": ViTModel,  # with one exit
    "dinov2": Dinov2Model,
    "vit_mae": ViTMAEModel,
    "vit_msn": ViTMSNModel,
}
_WHY_NOT = {
    "dinov2_with_registers": ", whose register tokens have no place in a ViT",
}
_DOWNLOAD_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
# What is taken over from a checkpoint's config: the first are the shapes of its weights and have to stay. What else it
# says (drop path, MAE's decoder and masking, a pooler) is nothing a ViT does on its way to [CLS].
_SHAPES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
_SETTINGS = (
    "image_size",
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
)


def read_vit(
    config_class: type[Config],
    pretrained_model_name_or_path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    **kwargs: Any,
) -> tuple[Config, ViTModel, nn.Linear | None]:
    """A pretrained backbone as a plain ViT, the config of a model that starts from it, and a classifier if it fits.

    Checkpoints may be of these types, with or without a head:

    - `vit`, which DINO's and those of DeiT without a distillation token are, too;
    - `mevit` with one exit, which is a plain ViT;
    - `dinov2`: its layer scales are multiplied into the attention's output projection and the MLP's second layer,
      which gives the same outputs. Register tokens and SwiGLU have no place in a ViT. Drop path, which acts in
      training alone, is left out;
    - `vit_mae`: the encoder, without masking. Its sine-cosine position embeddings are weights like any other here;
    - `vit_msn`.

    Args:
        config_class: type of the config wanted.
        pretrained_model_name_or_path: a local directory or the Hub name of a checkpoint.
        image_size: side of the images in pixels, or `(height, width)`; the checkpoint's by default.
        kwargs: fields of the config that differ from the checkpoint's, and Transformers' `revision`, `token`,
            `cache_dir`, `subfolder`, `local_files_only` and `force_download`. Labels are the checkpoint's if neither
            `num_labels` nor `id2label` is given.

    Returns:
        A `config_class` with the fields of the checkpoint and of `kwargs`; the backbone, float32, in eval mode; and
        the classifier on its final norm, if it is a `vit` or `mevit` that was trained for the labels of the config.
        Names that Transformers gives labels without any, `LABEL_0` and so on, do not tell that labels are the same.

    Raises:
        ValueError: if the checkpoint holds another kind of model, one with several exits, or lacks some of the
            backbone's weights, or if a field is unknown or would need another backbone.
    """
    checkpoint = pretrained_model_name_or_path
    download = {name: kwargs.pop(name) for name in _DOWNLOAD_ARGUMENTS if name in kwargs}
    validate_config_fields(config_class, kwargs)
    described, _ = ViTConfig.get_config_dict(checkpoint, **download)
    model_type: Any = described.get("model_type")
    if model_type not in _MODELS:
        raise ValueError(
            f"model_type of {checkpoint} must be one of {', '.join(map(repr, _MODELS))}; "
            f"got {model_type!r}{_WHY_NOT.get(model_type, '')}."
        )
    training_images = described.get("training_images")
    if model_type == "mevit":
        described = _as_plain_vit(checkpoint, described)
    model_class = _MODELS[model_type]
    own_config = model_class.config_class.from_dict(described)
    if getattr(own_config, "use_swiglu_ffn", False):
        raise ValueError(f"use_swiglu_ffn of {checkpoint} must be False, since a ViT's MLP has no gate; got True.")
    if model_type == "dinov2":
        own_config.intermediate_size = int(own_config.hidden_size * own_config.mlp_ratio)
    for name in _SHAPES:
        own = getattr(own_config, name)
        if kwargs.get(name, own) != own:
            raise ValueError(f"{name} must be {own}, as in {checkpoint}, got {kwargs[name]}.")

    settings = {name: getattr(own_config, name) for name in (*_SHAPES, *_SETTINGS)}
    backbone_config = ViTConfig(**settings)
    are_own_labels = "num_labels" not in kwargs and "id2label" not in kwargs
    if are_own_labels:
        settings.update(id2label=own_config.id2label, label2id=own_config.label2id)
    if model_type == "mevit" and issubclass(config_class, MEViTConfig):
        settings["training_images"] = training_images
    if image_size is not None:
        settings["image_size"] = image_size
    config = config_class(**{**settings, **kwargs})

    arguments: dict[str, Any] = {"add_pooling_layer": False} if model_class is ViTModel else {}
    has_names = config.id2label != {label: f"LABEL_{label}" for label in range(config.num_labels)}
    are_same_labels = are_own_labels or (has_names and config.id2label == own_config.id2label)
    reads_classifier = model_class is ViTModel and are_same_labels
    if reads_classifier:
        model_class, arguments = ViTForImageClassification, {"key_mapping": {r"^exits\.\d+\.classifier": "classifier"}}
    model, loading = model_class.from_pretrained(
        checkpoint,
        config=own_config,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        **arguments,
        **download,
    )
    lacking = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    classifier = None
    if reads_classifier:
        is_headless = any(name.startswith("classifier.") for name in lacking)
        lacking = [name.removeprefix("vit.") for name in lacking if not name.startswith("classifier.")]
        classifier, model = None if is_headless else model.classifier, model.vit
    if lacking:
        raise ValueError(f"{checkpoint} lacks weights of the backbone: {', '.join(lacking)}.")
    with torch.device("meta"):  # no memory, and no random numbers, for weights that are replaced at once
        vit = ViTModel(backbone_config, add_pooling_layer=False)
    if model_type == "dinov2":
        _assign_dinov2(vit, model)
    else:
        vit.load_state_dict(model.state_dict(), assign=True)
    return config, vit.train(False), classifier


def _as_plain_vit(checkpoint: str | os.PathLike[str], described: dict[str, Any]) -> dict[str, Any]:
    """The config of a MEViT with one exit as that of a plain ViT, which has the same weights but for the predictor."""
    exit_layers = MEViTConfig.from_dict(described).exit_layers
    if len(exit_layers) > 1:
        raise ValueError(
            f"a MEViT to start from must have one exit, got {checkpoint} with exits on {exit_layers}; "
            f"MEViTForImageClassification.from_pretrained reads it with all of them."
        )
    fields = ViTConfig().to_dict().keys() | {"id2label", "label2id"}
    return {name: value for name, value in described.items() if name in fields - {"model_type"}}


@torch.no_grad()
def _assign_dinov2(vit: Any, dinov2: Any) -> None:
    """Makes the weights of a DINOv2 those of a ViT, with each layer scale in the linear layer whose output it scales.

    A scale s makes W x + b into s (W x + b), which is (s W) x + s b. The mask token is of pretraining alone.
    """
    embeddings = dinov2.embeddings.state_dict()
    embeddings.pop("mask_token", None)
    vit.embeddings.load_state_dict(embeddings, assign=True)
    vit.layernorm.load_state_dict(dinov2.layernorm.state_dict(), assign=True)
    layer: Any
    for layer, own in zip(encoder_layers(vit), dinov2.encoder.layer, strict=True):
        first, second = (
            (layer.mlp.fc1, layer.mlp.fc2) if hasattr(layer, "mlp") else (layer.intermediate.dense, layer.output.dense)
        )
        for part, own_part in (
            (layer.layernorm_before, own.norm1),
            (layer.attention, own.attention),
            (layer.layernorm_after, own.norm2),
            (first, own.mlp.fc1),
            (second, own.mlp.fc2),
        ):
            part.load_state_dict(own_part.state_dict(), assign=True)
        for linear, scale in (
            (layer_parts(layer).projection, own.layer_scale1.lambda1),
            (second, own.layer_scale2.lambda1),
        ):
            linear.weight.mul_(scale[:, None])
            linear.bias.mul_(scale)


def load_backbone(backbone: ViTModel, vit: ViTModel, grid: tuple[int, int]) -> None:
    """Copies the weights of `vit` into `backbone`, whose patches make a grid of so many rows and columns."""
    weights = vit.state_dict()
    position_key = "embeddings.position_embeddings"
    weights[position_key] = interpolate_position_embeddings(
        weights[position_key], source=patch_grid(vit.config), target=grid
    )
    backbone.load_state_dict(weights)


def patch_grid(config: ViTConfig) -> tuple[int, int]:
    """Rows and columns of patches in an image of `config.image_size`."""
    height, width = to_2tuple(config.image_size)
    patch_height, patch_width = to_2tuple(config.patch_size)
    return height // patch_height, width // patch_width


def to_2tuple(size: int | Iterable[int]) -> tuple[int, int]:
    """Height and width, of a side in pixels or of `(height, width)`."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def interpolate_position_embeddings(embeddings: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Position embeddings of [CLS] and a grid of patches, fitted to another grid.

    This is what Transformers' ViT, DINOv2, MAE and MSN do for images of another size. The original code of DINOv2
    also adds 0.1 to the sides of the target grid as it scales, so that it samples up to 0.1 · source / target patches
    nearer to the first one: 0.23 from 37 × 37 to 16 × 16.

    Args:
        embeddings: (1, 1 + rows · columns, d) for the source grid.
        source: rows and columns of the grid they were trained on.
        target: rows and columns wanted.

    Returns:
        (1, 1 + rows · columns, d) for the target grid; [CLS] unchanged, patches by bicubic interpolation without
        antialiasing.
    """
    if source == target:
        return embeddings
    cls_position, patch_positions = embeddings[:, :1], embeddings[:, 1:]
    grid = patch_positions.reshape(1, *source, -1).permute(0, 3, 1, 2)  # (1, d, rows, columns)
    grid = nn.functional.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return torch.cat((cls_position, grid.flatten(2).transpose(1, 2)), dim=1)
