# SPDX-License-Identifier: Apache-2.0
"""Blocks of language models: the next token of a text takes two calls of the kernel library."""

from __future__ import annotations

from operator import is_not
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as hooks

from modewright.layers.attention_table import names_in_forward
from modewright.runtime.backends.choice import native_plan
from modewright.runtime.layers.fused.attention import (
    is_rotary_attention,
    rotary_formula,
    somewhere,
)
from modewright.runtime.layers.fused.base import FusedLayer, kernels_for
from modewright.runtime.layers.fused.growing import append
from modewright.runtime.layers.fused.pointwise import (
    eps_of,
    gate_formula,
    is_gate,
    is_norm,
    norm_formula,
)
from modewright.runtime.native.block import WEIGHTS, NativeBlock
from modewright.runtime.native.library import ACTIVATIONS, DTYPES, NativeWeight

KEPT = "_native_block"  # the attribute that holds what was made of a block
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_CACHES = ("cache", "past_key_values", "past_key_value")
_FEW_TEXTS = 8  # as many rows as the plans are for
# What the forward of such a block looks up, and nothing else
_NAMES = (
    "self hidden_states attention_mask position_ids cache past_key_values past_key_value use_cache "
    "cache_position position_embeddings kwargs residual _ input_layernorm self_attn "
    "post_attention_layernorm mlp"
)


class FusedBlock(FusedLayer):
    """Attention with rotary embeddings and a gated activation, each behind an RMS norm: Llama's.

    Prompts, and whatever asks for more than the output, run the block's own forward.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        found = None if args else self._next_token(hidden_states, kwargs)
        return self.own_forward(hidden_states, *args, **kwargs) if found is None else found

    def _next_token(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
        """Return the output for one token of each text, or ``None`` if the kernels do not serve."""
        cache: Any = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        where = given.get("position_embeddings")
        if x.dim() != 3 or x.shape[1] != 1 or not 0 < len(x) <= _FEW_TEXTS:
            return None
        if type(cache).__name__ != "DynamicCache" or not isinstance(where, tuple):
            return None
        cos, sin = where
        if given.get("attention_mask") is not None or given.get("output_attentions"):
            return None
        attention: dict[str, Any] = cast(nn.Module, self._modules["self_attn"]).__dict__
        config, inner = attention.get("config"), self._inner()
        if getattr(config, "_attn_implementation", "") != "sdpa" or _is_watched(inner):
            return None
        if kernels_for(x, cos, sin) is None or torch.is_autocast_enabled("cpu"):
            return None
        block = self._native(inner)
        if block is None or not x.is_contiguous() or x.shape[2] != block.width:
            return None
        if block.dtype is not x.dtype:
            return None
        if not all(_of_one_token(turn, len(x), block.features) for turn in (cos, sin)):
            return None
        place = attention["layer_idx"]
        return block.next_token(x, cos, sin, lambda key, value: append(cache, place, key, value))

    def _inner(self) -> tuple[Any, ...]:
        """Return the layers inside: the parts, and those that multiply, as :data:`WEIGHTS`."""
        parts: dict[str, Any] = self._modules
        multiply = {**parts["self_attn"]._modules, **parts["mlp"]._modules}
        return (*(parts[name] for name in _PARTS), *map(multiply.get, WEIGHTS))

    def _native(self, inner: tuple[Any, ...]) -> NativeBlock | None:
        """Return the block as the kernels have it, made anew when a tensor was replaced."""
        norms, layers = (inner[0], inner[2]), inner[len(_PARTS) :]
        tensors = [norm._parameters["weight"] for norm in norms]
        for layer in layers:
            buffers = layer._buffers
            tensors += buffers.get("weight_packed"), buffers.get("weight_scale")
            tensors += layer._parameters["bias"], buffers.get("input_scale")
        kept: _Kept = self.__dict__.setdefault(KEPT, _Kept())
        if len(kept.tensors) != len(tensors) or any(map(is_not, kept.tensors, tensors)):
            kept.block, kept.tensors = self._made(norms, layers), tensors
            if kept.block is None:
                kept.tensors = []
        return kept.block

    def _made(self, norms: tuple[Any, Any], layers: tuple[Any, ...]) -> NativeBlock | None:
        """Return a new one, or ``None`` if something else than the kernels serves a layer."""
        if not all(layer.__dict__.get("is_product") for layer in layers):
            return None
        inputs = [layer.record.activations.get("input") for layer in layers]
        acts = [None if spec is None else spec.name for spec in inputs]
        weights = [norm._parameters["weight"] for norm in norms]
        dtype = weights[0].dtype
        plans = [
            native_plan(layer.packed_weight(), act, dtype)
            for layer, act in zip(layers, acts, strict=True)
        ]
        biases = [layer._parameters["bias"] for layer in layers]
        for tensor in (*weights, *biases):
            if tensor is not None and not _is_plain(tensor, dtype):
                return None
        if None in plans or dtype not in DTYPES or not set(acts) <= set(ACTIVATIONS):
            return None
        attention = cast(nn.Module, self._modules["self_attn"]).__dict__
        first, second = (cast(float, eps_of(norm)) for norm in norms)
        return NativeBlock(
            cast(list[NativeWeight], plans),
            biases,
            [
                (act, layer._buffers.get("input_scale"))
                for act, layer in zip(acts, layers, strict=True)
            ],
            (weights[0], weights[1]),
            (first, second),
            attention["head_dim"],
            attention["scaling"],
        )


class _Kept:
    """What was made of a block: left out of copies and pickles, since it holds addresses."""

    def __init__(self) -> None:
        self.block: NativeBlock | None = None
        self.tensors: list[torch.Tensor | None] = []

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _is_watched(layers: tuple[Any, ...]) -> bool:
    """Whether somebody wants to see what is inside a block, or changed it."""
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return True
    return any(
        layer is None
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in layer.__dict__
        for layer in layers
    )


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()


def _of_one_token(turn: torch.Tensor, texts: int, features: int) -> bool:
    """Whether these are the sines or cosines of one token of each text."""
    return (
        turn.dim() == 3
        and turn.shape[0] in (1, texts)
        and turn.shape[1:] == (1, features)
        and turn.is_contiguous()
    )


def is_block(layer: nn.Module) -> bool:
    """Whether a layer has what Llama's block has, and its forward uses nothing else."""
    parts = layer._modules
    return (
        set(parts) == set(_PARTS)
        and not layer._parameters
        and set(names_in_forward(type(layer))) <= set(_NAMES.split())  # type: ignore[arg-type]
        and all(is_norm(cast(nn.Module, parts[name])) for name in (_PARTS[0], _PARTS[2]))
        and is_rotary_attention(cast(nn.Module, parts["self_attn"]))
        and is_gate(cast(nn.Module, parts["mlp"]))
    )


def run_block(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what such a layer makes of a text ``[n, width]``, see :func:`block_formula`."""
    where = somewhere(cast(nn.Module, layer._modules["self_attn"]), x)
    found = layer(x[None], position_embeddings=where, attention_mask=None)
    return cast(torch.Tensor, found[0])


def block_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what it should."""
    first, attention, second, mlp = (cast(nn.Module, layer._modules[name]) for name in _PARTS)
    hidden = x + rotary_formula(attention, norm_formula(first, x))
    return hidden + gate_formula(mlp, norm_formula(second, hidden))
