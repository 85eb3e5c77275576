# SPDX-License-Identifier: Apache-2.0
"""Blocks of language models: the next token of a text takes one call of the kernel library."""

from __future__ import annotations

from itertools import chain, repeat
from operator import contains, is_not
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as hooks

from modewright.layers.attention_table import implementation_of, names_in_forward
from modewright.runtime.backends.choice import native_plan
from modewright.runtime.layers.fused.attention import (
    is_rotary_attention,
    rotary_formula,
    somewhere,
)
from modewright.runtime.layers.fused.base import FusedLayer, kernels_for
from modewright.runtime.layers.fused.growing import room_of
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
        where = given.get("position_embeddings")
        if x.dim() != 3 or x.shape[1] != 1 or not 0 < len(x) <= _FEW_TEXTS:
            return None
        if given.get("attention_mask") is not None or given.get("output_attentions"):
            return None
        cache: Any = None
        for name in _CACHES:
            cache = given.get(name) if cache is None else cache
        if type(cache).__name__ != "DynamicCache" or not isinstance(where, tuple):
            return None
        cos, sin = where
        if kernels_for(x, cos, sin) is None or torch.is_autocast_enabled("cpu"):
            return None
        block = self._native()
        if block is None or block.dtype is not x.dtype:
            return None
        if x.shape[2] != block.width or not x.is_contiguous():
            return None
        if not _of_one_token(cos, sin, len(x), block.features):
            return None
        attention: dict[str, Any] = cast(nn.Module, self._modules["self_attn"]).__dict__
        if implementation_of(attention.get("config")) != "sdpa":
            return None
        return self._appended(block, x, where, cache, attention["layer_idx"])

    def _appended(
        self, block: NativeBlock, x: torch.Tensor, where: tuple[Any, Any], cache: Any, place: int
    ) -> torch.Tensor:
        """Return the output, and leave the token's key and value in the cache."""
        layers = getattr(cache, "layers", ())
        layer = layers[place] if place < len(layers) else None
        kind = (len(x), block.kv_heads, block.features, x.dtype, x.device)
        room = None if layer is None else room_of(cache, layer, kind)
        if room is None:
            return block.next_token(x, *where, lambda key, value: cache.update(key, value, place))
        result = block.append_token(x, *where, room.keys, room.values, room.tokens + 1)
        room.grow(layer)
        return result

    def _native(self) -> NativeBlock | None:
        """Return the block as the kernels have it, made anew when something was replaced.

        ``None`` if they do not serve, somebody wants to see what is inside, or changed it.
        """
        kept: _Kept | None = self.__dict__.get(KEPT)
        if kept is None:
            kept = self.__dict__[KEPT] = _Kept()
        parts: dict[str, Any] = self._modules
        if not kept.is_of(parts):
            kept.take(parts)
        if kept.is_watched() or hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return None
        if kept.are_replaced():
            kept.block = self._made(kept.norms, kept.multiply)
            kept.tensors = [] if kept.block is None else kept.now()
        return kept.block

    def _made(self, norms: tuple[Any, Any], layers: list[Any]) -> NativeBlock | None:
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
    """What was made of a block: left out of copies and pickles, since it holds addresses.

    It is compared with what is there for each token, so the dictionaries are kept that modules and
    tensors are looked up in: this way, a comparison is a few calls, whatever the number of layers.
    """

    def __init__(self) -> None:
        self.block: NativeBlock | None = None
        self.tensors: list[torch.Tensor | None] = []
        self._modules: list[Any] = []

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()

    def is_of(self, parts: dict[str, Any]) -> bool:
        """Whether the layers of a block are still those that were taken."""
        if not self._modules:
            return False
        return [*parts.values(), *self._attention.values(), *self._mlp.values()] == self._modules

    def take(self, parts: dict[str, Any]) -> None:
        """Take note of the layers of a block; of none where they are no longer those of a block."""
        self._attention, self._mlp = (
            getattr(parts[name], "_modules", {}) for name in ("self_attn", "mlp")
        )
        children = {**self._attention, **self._mlp}
        self.norms: tuple[Any, Any] = (parts[_PARTS[0]], parts[_PARTS[2]])
        self.multiply: list[Any] = [children.get(name) for name in WEIGHTS]
        layers = [*(parts[name] for name in _PARTS), *self.multiply]
        self._whole = all(isinstance(layer, nn.Module) for layer in layers)
        if not self._whole:
            return
        self._modules = [*parts.values(), *self._attention.values(), *self._mlp.values()]
        self._hooks = [layer._forward_hooks for layer in layers]
        self._hooks += [layer._forward_pre_hooks for layer in layers]
        self._own = [layer.__dict__ for layer in layers]
        self._stores = [layer._parameters for layer in (*self.norms, *self.multiply)]
        self._stores += [layer._buffers for layer in self.multiply]
        self.block, self.tensors = None, []

    def is_watched(self) -> bool:
        """Whether a layer has hooks, or a forward of its own; or is not there."""
        if not self._whole or any(self._hooks):
            return True
        return any(map(contains, self._own, repeat("forward")))

    def now(self) -> list[torch.Tensor | None]:
        """Return the tensors of the layers."""
        return list(chain.from_iterable(map(dict.values, self._stores)))

    def are_replaced(self) -> bool:
        """Whether the block was made of other tensors, or not made."""
        now = self.now()
        return len(now) != len(self.tensors) or any(map(is_not, now, self.tensors))


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()


def _of_one_token(cos: torch.Tensor, sin: torch.Tensor, texts: int, features: int) -> bool:
    """Whether these are the sines and cosines of one token of each text."""
    shape = cos.shape
    return (
        (shape == (1, 1, features) or shape == (texts, 1, features))
        and sin.shape == shape
        and cos.is_contiguous()
        and sin.is_contiguous()
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
