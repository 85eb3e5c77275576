# SPDX-License-Identifier: Apache-2.0
"""Attention of Transformers models: keys and values pass through quantizers.

A function of the name ``modewright_kv`` is added to the table that such layers take theirs from
(:mod:`modewright.layers.attention_table`). It quantizes keys and values (after rotary embedding,
with those of the cache) and calls the one that the config names. Only a quantized attention layer
sees that name.
"""

from __future__ import annotations

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
from modewright.quantization.layers.base import QuantizedLayer, make_quantizer, own_class
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import SchemeConfig

NAME = "modewright_kv"
_QUANTIZED = "_modewright_quantized"
_CACHES = ("cache", "past_key_values", "past_key_value")  # the argument, newest name first


class KvAttentionForward(QuantizedLayer):
    """Attention with quantized keys and values; its projections are layers of their own."""

    key_quantizer: Quantizer | None
    value_quantizer: Quantizer | None

    @classmethod
    def parameter_names(cls, module: nn.Module) -> tuple[str, ...]:  # noqa: D102
        return ()

    @classmethod
    def fitted(cls, module: nn.Module, scheme: SchemeConfig) -> SchemeConfig:  # noqa: D102
        return SchemeConfig(kv_cache=scheme.kv_cache)

    def add_quantizers(self, scheme: SchemeConfig) -> None:  # noqa: D102
        super().add_quantizers(scheme)
        self.key_quantizer = make_quantizer(scheme.kv_cache)
        self.value_quantizer = make_quantizer(scheme.kv_cache)
        register_function(own_class(type(self)), NAME, _attend)

    @property
    def config(self) -> ConfigView:
        """The layer's config, under which it calls this module's function."""
        return ConfigView(self.__dict__["config"], NAME)

    @config.setter
    def config(self, value: object) -> None:
        self.__dict__["config"] = value


def is_kv_attention(module: nn.Module) -> bool:
    """Whether a layer takes its function from the table of Transformers, and a cache."""
    names = names_in_forward(type(module))  # type: ignore[arg-type]
    return takes_function(module) and any(name in names for name in _CACHES)


def mark_quantized(tensor: torch.Tensor) -> torch.Tensor:
    """Note on keys or values that they were quantized before: by a cache that stores them so."""
    setattr(tensor, _QUANTIZED, True)
    return tensor


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Quantize keys and values, ``[batch, heads, tokens, features]``, and attend."""
    layer = cast(KvAttentionForward, module)
    behind = layer.__dict__["config"]._attn_implementation
    function = function_named(own_class(type(layer)), behind)
    if layer.key_quantizer is not None and not hasattr(key, _QUANTIZED):
        key = layer.key_quantizer(key)
    if layer.value_quantizer is not None and not hasattr(value, _QUANTIZED):
        value = layer.value_quantizer(value)
    return function(module, query, key, value, *args, **kwargs)
