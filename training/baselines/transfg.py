# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""TransFG (He et al., *TransFG: A Transformer Architecture for Fine-Grained Recognition*, AAAI 2022).

A ViT on overlapping patches whose last layer sees [CLS] and a few selected patches alone. Attention tells which: the
product of the attention matrices of all layers below says how much of each patch has reached [CLS], and each head
selects the patch that it took most of.

B samples, N tokens of width d, H heads, n layers with the last one, L labels.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from modeling_mevit.early_exit.cost import relative_cost
from modeling_mevit.early_exit.predictions import ExitPredictions, batches
from modeling_mevit.encoder_layer_mevit import encoder_layers, recorded_attentions
from modeling_mevit.trainer import MEViTTrainer
from modeling_mevit.vit_backbone_mevit import load_backbone, read_vit


SELECTIONS = ("row", "matrix_product")


class TransFGConfig(ViTConfig):
    r"""
    Everything of [`ViTConfig`], and what TransFG adds. `num_hidden_layers` counts the part layer, the last one.

    Args:
        patch_stride (`int`, *optional*, defaults to 12):
            Pixels from one patch to the next; less than `patch_size` makes them overlap.
        part_selection (`str`, *optional*, defaults to `"row"`):
            How [CLS]'s row of the product of the attention matrices is computed: `"row"`, a row times matrices, or
            `"matrix_product"`, the whole product, as published. Both select the same patches.
        contrastive_margin (`float`, *optional*, defaults to 0.4):
            Cosine similarity up to which [CLS] states of different classes are left alone.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Of the cross entropy.
        kwargs:
            The arguments of [`ViTConfig`].

    Raises:
        ValueError: if an argument allows no model; the message names it.
    """

    model_type = "transfg"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]

    def __init__(
        self,
        patch_stride: int = 12,
        part_selection: str = "row",
        contrastive_margin: float = 0.4,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ):
        attention = kwargs.pop("attn_implementation", None) or "eager"
        if attention != "eager":
            raise ValueError(
                f"attn_implementation must be 'eager', which keeps the attention probabilities that select the parts, "
                f"got {attention!r}"
            )
        super().__init__(attn_implementation="eager", **kwargs)
        self.patch_stride = patch_stride
        self.part_selection = part_selection
        self.contrastive_margin = contrastive_margin
        self.label_smoothing = label_smoothing
        if part_selection not in SELECTIONS:
            raise ValueError(f"part_selection must be one of {', '.join(SELECTIONS)}, got {part_selection!r}")
        if self.num_hidden_layers < 2:
            raise ValueError(f"num_hidden_layers must be 2 or more, got {self.num_hidden_layers}")
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, the side of a square, got {getattr(self, name)}")
        if not 0 < patch_stride <= self.patch_size:
            raise ValueError(f"patch_stride must be from 1 to patch_size={self.patch_size}, got {patch_stride}")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size must be at least patch_size={self.patch_size}, got {self.image_size}")

    @property
    def exit_layers(self) -> list[int]:
        """Where a classifier reads, in the terms of a multi-exit model: the last layer alone."""
        return [self.num_hidden_layers]


class TransFGForImageClassification(ViTPreTrainedModel):
    """A [`ViTModel`] with overlapping patches, whose last layer runs on [CLS] and one patch for each head.

    Where a paper leaves the part layer's first weights open, they are those of the backbone's last layer here.
    """

    config_class = TransFGConfig
    starts_with_classifier = False
    # the batch mean is taken here, so a Trainer has to divide by its accumulation steps itself
    accepts_loss_kwargs = False

    def __init__(self, config: TransFGConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        embeddings = self.vit.embeddings
        embeddings.patch_embeddings.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_stride
        )
        rows, columns = overlapping_grid(config)
        embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`):
                Images of `config.image_size`.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                Class indices. The loss is cross entropy plus [`contrastive_loss`].
            output_hidden_states, output_attentions (`bool`, *optional*):
                Whether to return the embeddings and each layer's output, and the attention probabilities of the
                layers below the part layer.

        Returns:
            `loss` where labels are given, `logits` (B, L), `hidden_states` and `attentions` where asked for.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        *layers, part_layer = encoder_layers(self.vit)
        hidden_state = self.vit.embeddings(pixel_values)  # (B, N, d)
        hidden_states = [hidden_state]
        with recorded_attentions(layers) as attentions:
            for layer in layers:
                hidden_state = layer(hidden_state)
                hidden_states.append(hidden_state)

        parts = select_parts(attentions, config.part_selection)  # (B, H)
        selected = hidden_state.gather(1, parts[:, :, None].expand(-1, -1, hidden_state.shape[2]))  # (B, H, d)
        hidden_state = part_layer(torch.cat((hidden_state[:, :1], selected), dim=1))  # (B, 1 + H, d)
        hidden_states.append(hidden_state)
        cls_state = self.vit.layernorm(hidden_state[:, 0])  # (B, d)
        logits = self.classifier(cls_state)  # (B, L)

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            loss = loss + contrastive_loss(cls_state.float(), labels, config.contrastive_margin)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    @classmethod
    def from_vit(
        cls, pretrained_model_name_or_path: str, *, image_size: int | None = None, **kwargs: Any
    ) -> "TransFGForImageClassification":
        """TransFG on the weights of a pretrained ViT; position embeddings are interpolated to the overlapping grid.

        Args:
            pretrained_model_name_or_path: as in [`MEViTForImageClassification.from_vit`].
            image_size: side of the images in pixels, the checkpoint's by default.
            kwargs: fields of [`TransFGConfig`] that differ from the checkpoint's.

        Returns:
            The model, float32, in eval mode.

        Raises:
            ValueError: as [`MEViTForImageClassification.from_vit`] does.
        """
        config, vit, _ = read_vit(cls.config_class, pretrained_model_name_or_path, image_size=image_size, **kwargs)
        model = cls(config)
        load_backbone(model.vit, vit, grid=overlapping_grid(config))
        return model.eval()


class TransFGTrainer(MEViTTrainer):
    """A [`Trainer`] with the learning rates, the standardised start and the strict loading of [`MEViTTrainer`].

    The loss is the model's own.
    """

    compute_loss = Trainer.compute_loss
    prediction_step = Trainer.prediction_step
    log = Trainer.log
    create_model_card = Trainer.create_model_card


@torch.no_grad()
def predict(
    model: TransFGForImageClassification, dataset: Dataset, *, batch_size: int = 32, num_workers: int = 0
) -> ExitPredictions:
    """Predictions on a data set, as [`~early_exit.predictions.predict_exits`] gives them, of one exit and no score."""
    labels, predictions = [], []
    for batch in batches(dataset, batch_size, num_workers, "TransFG"):
        predictions.append(model(batch["pixel_values"].to(model.device)).logits.argmax(-1).cpu().numpy())
        labels.append(batch["labels"].numpy())
    return ExitPredictions(
        exit_layers=model.config.exit_layers,
        costs=np.array([relative_cost(type(model), model.config)]),
        labels=np.concatenate(labels),
        predictions=np.concatenate(predictions)[:, None],
        scores={},
    )


def overlapping_grid(config: TransFGConfig) -> tuple[int, int]:
    """Rows and columns of patches in an image of `config.image_size`."""
    side = (config.image_size - config.patch_size) // config.patch_stride + 1
    return side, side


@torch.no_grad()
def select_parts(attentions: list[Tensor], by: str) -> Tensor:
    """The token that each head selects: the patch with the largest entry in [CLS]'s row of `A_n · … · A_1`.

    Args:
        attentions: probabilities A_i of each layer, from the first on, (B, H, N, N) each.
        by: one of [`SELECTIONS`]. A row times matrices costs N² a layer, the product of matrices N³.

    Returns:
        (B, H), int64, in 1 … N − 1; heads may agree.
    """
    if by == "row":
        row = attentions[-1][:, :, :1]  # (B, H, 1, N)
        for attention in reversed(attentions[:-1]):
            row = row @ attention
    else:
        product = attentions[0]  # (B, H, N, N)
        for attention in attentions[1:]:
            product = attention @ product
        row = product[:, :, :1]
    return row[:, :, 0, 1:].argmax(-1) + 1


def contrastive_loss(cls_states: Tensor, labels: Tensor, margin: float) -> Tensor:
    """`(1/B²) [Σ_same (1 − cos(z_i, z_j)) + Σ_different max(cos(z_i, z_j) − margin, 0)]` over all B² pairs.

    Args:
        cls_states: (B, d), z_i.
        labels: (B,).
        margin: similarity that is allowed between classes.

    Returns:
        A scalar.
    """
    directions = F.normalize(cls_states, dim=-1)
    similarity = directions @ directions.T  # (B, B)
    is_same = labels[:, None] == labels[None, :]
    return torch.where(is_same, 1 - similarity, (similarity - margin).clamp_min(0)).mean()
