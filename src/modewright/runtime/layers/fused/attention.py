# SPDX-License-Identifier: Apache-2.0
"""Attention: of all tokens of a prompt, and of the next token of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from modewright.layers.attention_table import (
    ConfigView,
    function_named,
    names_in_forward,
    register_function,
    takes_function,
)
from modewright.runtime.layers.fused.base import FusedLayer, kernels_for, own_class

NAME = "modewright_fused"
_FEW_TOKENS = 16  # for fewer, torch's attention is as fast
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What the forward of attention with rotary embeddings looks up, and nothing else
_ROTARY = (
    "self hidden_states position_embeddings attention_mask cache past_key_values past_key_value "
    "cache_position cache_kwargs kwargs input_shape hidden_shape query_states key_states "
    "value_states cos sin attention_interface attn_output attn_weights shape head_dim q_proj "
    "k_proj v_proj o_proj view transpose apply_rotary_pos_emb update layer_idx config "
    "ALL_ATTENTION_FUNCTIONS get_interface _attn_implementation eager_attention_forward training "
    "attention_dropout scaling reshape contiguous getattr sliding_window Callable"
)


class FusedAttention(FusedLayer):
    """Attention that takes its function from the table of Transformers, and finds ours there."""

    @property
    def config(self) -> object:
        """The layer's config, under which it calls this module's function."""
        config = self.__dict__["config"]
        return config if torch.compiler.is_compiling() else ConfigView(config, NAME)

    @config.setter
    def config(self, value: object) -> None:
        self.__dict__["config"] = value


def is_attention(layer: nn.Module) -> bool:
    """Whether a layer takes the function that computes it from the table of Transformers."""
    return takes_function(layer) and "config" not in vars(type(layer))


def is_rotary_attention(layer: nn.Module) -> bool:
    """Whether a layer has what Llama's attention has, and its forward uses nothing else."""
    own = layer.__dict__
    return (
        is_attention(layer)
        and set(layer._modules) == set(_PROJECTIONS)
        and all(isinstance(child, nn.Linear) for child in layer._modules.values())
        and not layer._parameters
        and set(names_in_forward(type(layer))) <= set(_ROTARY.split())  # type: ignore[arg-type]
        and all(isinstance(own.get(name), int) for name in ("head_dim", "layer_idx"))
        and isinstance(own.get("scaling"), float)
        and own["head_dim"] % 16 == 0
    )


def rotary_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what such attention should make of a text ``[n, width]``, see :func:`somewhere`."""
    own: Any = layer
    cos, sin = somewhere(layer, x)

    def turned(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin

    query, key, value = (
        own._modules[name](x).view(len(x), -1, own.head_dim).transpose(0, 1)
        for name in _PROJECTIONS[:3]
    )
    shared = len(query) // len(key)
    key, value = (turned(key).repeat_interleave(shared, 0), value.repeat_interleave(shared, 0))
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    scores = (turned(query) @ key.mT * own.scaling).masked_fill(later, -torch.inf)
    seen = (scores.softmax(-1) @ value).transpose(0, 1)
    return cast(torch.Tensor, own.o_proj(seen.reshape(len(x), -1)))


def somewhere(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some cosines and sines for a text ``[n, width]``: ``[1, n, features]``, its dtype."""
    size = (1, len(x), layer.__dict__["head_dim"])
    cos, sin = torch.randn(2, *size, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return cos, sin


def register(cls: type[nn.Module]) -> None:
    """Let layers of a class find the function."""
    register_function(cls, NAME, _attend)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attend as ``"sdpa"`` does, or as the function that the config names."""
    behind = module.__dict__["config"]._attn_implementation
    if behind == "sdpa" and attention_mask is None and not args:
        kernels = kernels_for(query, key, value)
        if kernels is not None and _is_causal(module, query, key, kwargs):
            scaling = kwargs.get("scaling")
            if kernels.can_attend(query, key, value):
                factor = query.shape[-1] ** -0.5 if scaling is None else scaling
                return kernels.attend(query, key, value, factor), None
    function = function_named(own_class(type(module)), behind)
    return function(module, query, key, value, attention_mask, *args, **kwargs)


def _is_causal(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, given: Mapping[str, Any]
) -> bool:
    """Whether just causal attention is asked for, of all tokens, and enough of them."""
    causal = given.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return bool(
        causal
        and query.shape[2] == key.shape[2] >= _FEW_TOKENS
        and not given.get("dropout")
        and given.get("position_bias") is None
        and given.get("softcap") is None
        and not given.get("output_attentions")
    )
