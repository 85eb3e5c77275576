# SPDX-License-Identifier: Apache-2.0
"""Attention of Transformers models: keys and values pass through quantizers.

Such attention picks the function that computes it by the name ``config._attn_implementation``, from
a table that is open to additions. One name is added there, ``modewright_kv``, whose function
quantizes keys and values (after rotary embedding, with those of the cache) and calls the one that
the config names. Only a quantized attention layer sees that name, through a view of its config;
the config itself, and what is saved of it, stay as they are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any, cast

import torch
from torch import nn

from modewright.quantization.layers.base import QuantizedLayer, make_quantizer, own_class
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import SchemeConfig

NAME = "modewright_kv"
_QUANTIZED = "_modewright_quantized"
_TABLE = "ALL_ATTENTION_FUNCTIONS"
_CACHES = ("cache", "past_key_values", "past_key_value")  # the argument, newest name first


class _Routed(str):
    """The name of this module's function; it compares like the name of the one behind it too."""

    __slots__ = ("behind",)
    behind: object

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self.behind == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class _ConfigView:
    """A config with another ``_attn_implementation``; everything else is the config's own."""

    def __init__(self, config: object) -> None:
        object.__setattr__(self, "_config", config)

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "_config"), name)
        if name != "_attn_implementation":
            return value
        routed = _Routed(NAME)
        routed.behind = value
        return routed

    def __setattr__(self, name: str, value: object) -> None:
        setattr(object.__getattribute__(self, "_config"), name, value)


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
        type(_table_of(own_class(type(self)))).register(NAME, _attend)

    @property
    def config(self) -> _ConfigView:
        """The layer's config, under which it calls this module's function."""
        return _ConfigView(self.__dict__["config"])

    @config.setter
    def config(self, value: object) -> None:
        self.__dict__["config"] = value


def is_kv_attention(module: nn.Module) -> bool:
    """Whether a layer takes its function from the table of Transformers, and a cache."""
    names = _names_in_forward(type(module))  # type: ignore[arg-type]
    return (
        _TABLE in names
        and any(name in names for name in _CACHES)
        and hasattr(module.__dict__.get("config"), "_attn_implementation")
        and hasattr(sys.modules.get(type(module).__module__), _TABLE)
    )


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
    cls = own_class(type(layer))
    behind = layer.__dict__["config"]._attn_implementation
    function = _table_of(cls).get_interface(behind, _eager_function(cls))
    if layer.key_quantizer is not None and not hasattr(key, _QUANTIZED):
        key = layer.key_quantizer(key)
    if layer.value_quantizer is not None and not hasattr(value, _QUANTIZED):
        value = layer.value_quantizer(value)
    return function(module, query, key, value, *args, **kwargs)


def _table_of(cls: type[nn.Module]) -> Any:
    return getattr(sys.modules[cls.__module__], _TABLE)


def _eager_function(cls: type[nn.Module]) -> Any:
    """Return what a layer passes to the table as the function for ``"eager"``."""
    names = _names_in_forward(cls)  # type: ignore[arg-type]
    name = next((name for name in names if name.endswith("eager_attention_forward")), "")
    return getattr(sys.modules[cls.__module__], name, None)


@cache
def _names_in_forward(cls: type[nn.Module]) -> tuple[str, ...]:
    """Return the names that the forward of a class uses, those of its arguments among them."""
    forward: Callable[..., Any] = inspect.unwrap(cls.forward)
    code = getattr(forward, "__code__", None)
    return code.co_names + code.co_varnames if isinstance(code, CodeType) else ()
