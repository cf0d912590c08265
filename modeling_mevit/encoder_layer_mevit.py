# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A ViT's encoder layer run in two parts: keys and values of all tokens, then the layer's output for some of them.

An exit reads [CLS] alone, and [CLS] needs of the other tokens no more than their keys and values. So an exit's layer
is run for [CLS] first, and for the other tokens only where a sample goes on. Both parts use the library's own modules,
whose names differ between Transformers 4 and 5.

B samples, N tokens of width d, R of them as rows, H heads of width d/H.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from transformers import ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward


class LayerParts(NamedTuple):
    """The modules of an encoder layer's attention and MLP, without norms, dropout and residual connections."""

    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    projection: nn.Linear
    mlp: Callable[[Tensor], Tensor]


def encoder_layers(vit: ViTModel) -> nn.ModuleList:
    """The encoder layers of a [`ViTModel`]."""
    return vit.layers if hasattr(vit, "layers") else vit.encoder.layer


def layer_parts(layer: nn.Module) -> LayerParts:
    """The parts of an encoder layer, whatever the major version of Transformers calls them."""
    attention = layer.attention
    if hasattr(attention, "q_proj"):
        return LayerParts(attention, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp)
    own = attention.attention
    return LayerParts(
        own,
        own.query,
        own.key,
        own.value,
        attention.output.dense,
        lambda rows: layer.output.dense(layer.intermediate(rows)),
    )


@contextmanager
def recorded_attentions(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gets the attention probabilities (B, H, N, N) of each layer that runs; needs eager attention."""
    attentions: list[Tensor] = []
    hooks = [
        layer_parts(layer).attention.register_forward_hook(lambda module, args, output: attentions.append(output[1]))
        for layer in layers
    ]
    try:
        yield attentions
    finally:
        for hook in hooks:
            hook.remove()


def project_keys_values(layer: nn.Module, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First part of a layer, for all tokens of its input.

    Args:
        hidden_state: (B, N, d), the layer's input.

    Returns:
        The normalised input (B, N, d), keys and values (B, H, N, d/H).
    """
    parts = layer_parts(layer)
    normed = layer.layernorm_before(hidden_state)
    return normed, _heads(parts, parts.key(normed)), _heads(parts, parts.value(normed))


def layer_outputs(layer: nn.Module, hidden_rows: Tensor, normed_rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Second part of a layer, for any of its tokens, in eval mode: [`attention_outputs`], then [`mlp_outputs`].

    Args:
        hidden_rows: (B, R, d), rows of the layer's input.
        normed_rows: (B, R, d), the same rows of the normalised input.
        keys, values: (B, H, N, d/H), of all tokens.

    Returns:
        (B, R, d), these rows of the layer's output.
    """
    return mlp_outputs(layer, attention_outputs(layer, hidden_rows, normed_rows, keys, values))


def attention_outputs(layer: nn.Module, hidden_rows: Tensor, normed_rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rows after attention and its residual connection, (B, R, d). Arguments are those of [`layer_outputs`]."""
    parts = layer_parts(layer)
    implementation = parts.attention.config._attn_implementation
    attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    query = _heads(parts, parts.query(normed_rows))  # (B, H, R, d/H)
    context, _ = attend(parts.attention, query, keys, values, None, scaling=parts.attention.scaling, dropout=0.0)
    return hidden_rows + parts.projection(context.flatten(2))  # context is (B, R, H, d/H)


def mlp_outputs(layer: nn.Module, hidden_rows: Tensor) -> Tensor:
    """Rows after the MLP and its residual connection, (B, R, d), from those after attention."""
    return hidden_rows + layer_parts(layer).mlp(layer.layernorm_after(hidden_rows))


def _heads(parts: LayerParts, states: Tensor) -> Tensor:
    """(B, R, d) → (B, H, R, d/H)."""
    return states.unflatten(-1, (parts.attention.num_attention_heads, -1)).transpose(1, 2)
