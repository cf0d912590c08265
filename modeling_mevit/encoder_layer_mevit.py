# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A ViT's encoder layer run in two parts: keys and values of all tokens, then the layer's output for some of them.

An exit reads [CLS] alone, and [CLS] needs of the other tokens no more than their keys and values. So an exit's layer
is run for [CLS] first, and for the other tokens only if a sample goes on. Both parts use Transformers' own modules,
whose names differ between its major versions 4 and 5.

B samples, N tokens of width d, Q query tokens (those whose output is computed), H heads of width d/H.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor, nn
from transformers import ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTLayer, eager_attention_forward


_HOOKING = threading.Lock()  # torch numbers hooks without one

EncoderLayer: TypeAlias = Any  # a ViTLayer, whose modules' names no annotation knows in both major versions


class LayerParts(NamedTuple):
    """The modules of an encoder layer's attention and MLP, without norms, dropout and residual connections."""

    attention: Any  # an nn.Module, with its config, num_attention_heads and scaling
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    projection: nn.Linear
    mlp: Callable[[Tensor], Tensor]


def encoder_layers(vit: ViTModel) -> nn.ModuleList:
    """The encoder layers of a [`ViTModel`]."""
    return cast(nn.ModuleList, vit.layers if hasattr(vit, "layers") else vit.encoder.layer)


def layer_parts(layer: EncoderLayer) -> LayerParts:
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
        lambda states: layer.output.dense(layer.intermediate(states)),
    )


def runs_whole(layer: EncoderLayer) -> bool:
    """Whether a layer has to be called as one module, since something waits for that call, or for its attention's.

    Torch hooks do, with which weights are gathered and outputs recorded; accelerate's hook, which replaces `forward`
    to move the inputs to the module's device; and whatever is wrapped around the layer. Hooks of the linear layers
    and norms do not, since these are called in both parts.
    """
    if not isinstance(layer, ViTLayer):
        return True
    return any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        for module in layer.modules()
        if module._modules
    )


@contextmanager
def recorded_attentions(layers: Iterable[EncoderLayer]) -> Iterator[list[Tensor]]:
    """A list that gets the attention probabilities (B, H, N, N) of each layer that this thread runs; needs eager
    attention. Hooks see the calls of all threads."""
    attentions: list[Tensor] = []
    thread = threading.get_ident()

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            attentions.append(output[1])

    with _HOOKING:
        hooks = [layer_parts(layer).attention.register_forward_hook(record) for layer in layers]
    try:
        yield attentions
    finally:
        with _HOOKING:
            for hook in hooks:
                hook.remove()


def project_keys_values(layer: EncoderLayer, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First part of a layer, for all tokens of its input.

    Args:
        hidden_state: (B, N, d), the layer's input.

    Returns:
        The normalised input (B, N, d), keys and values (B, H, N, d/H).
    """
    parts = layer_parts(layer)
    normed = layer.layernorm_before(hidden_state)
    return normed, _heads(parts, parts.key(normed)), _heads(parts, parts.value(normed))


def layer_outputs(
    layer: EncoderLayer, hidden_queries: Tensor, normed_queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Second part of a layer, for any of its tokens, in eval mode: [`attention_outputs`], then [`mlp_outputs`].

    Args:
        hidden_queries: (B, Q, d), query tokens of the layer's input.
        normed_queries: (B, Q, d), the same tokens of the normalised input.
        keys: (B, H, N, d/H), of all tokens.
        values: (B, H, N, d/H), of all tokens.

    Returns:
        (B, Q, d), the layer's output for these tokens.
    """
    return mlp_outputs(layer, attention_outputs(layer, hidden_queries, normed_queries, keys, values))


def attention_outputs(
    layer: EncoderLayer, hidden_queries: Tensor, normed_queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Query tokens after attention and its residual connection, (B, Q, d). Arguments as in [`layer_outputs`]."""
    parts = layer_parts(layer)
    implementation = parts.attention.config._attn_implementation
    attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    query = _heads(parts, parts.query(normed_queries))  # (B, H, Q, d/H)
    context, _ = attend(parts.attention, query, keys, values, None, scaling=parts.attention.scaling, dropout=0.0)
    outputs: Tensor = hidden_queries + parts.projection(context.flatten(2))  # context is (B, Q, H, d/H)
    return outputs


def mlp_outputs(layer: EncoderLayer, hidden_queries: Tensor) -> Tensor:
    """Query tokens after the MLP and its residual connection, (B, Q, d), from those after attention."""
    return hidden_queries + layer_parts(layer).mlp(layer.layernorm_after(hidden_queries))


def _heads(parts: LayerParts, states: Tensor) -> Tensor:
    """(B, Q, d) → (B, H, Q, d/H)."""
    heads: Tensor = states.view(*states.shape[:-1], parts.attention.num_attention_heads, -1)
    return heads.transpose(1, 2)
