# SPDX-License-Identifier: Apache-2.0
"""A cache for Transformers models that stores keys and values in as many bits as they have.

It is for models whose attention was quantized with a scheme such as ``kv8``. Each layer keeps rows
of bytes (:mod:`modewright.runtime.packed_tokens`) and unpacks them for the attention of that layer
alone, so what lies in memory between two tokens is small.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from modewright.errors import ConfigError
from modewright.integrations.model_folder import transformers_package
from modewright.quantization.layers.kv_attention import KvAttentionForward, mark_quantized
from modewright.quantization.packing import activation_spec
from modewright.quantization.quantizer import Quantizer
from modewright.runtime.packed_tokens import TokenPacker


def packed_cache(model: nn.Module) -> Any:
    """Return an empty cache for one generation: ``generate(..., cache=packed_cache(model))``.

    Transformers before 5 call that argument ``past_key_values``. Tokens come out as with the cache
    of Transformers, in which the same model keeps full precision and quantizes it for every token.

    Args:
        model: A causal language model of Transformers with quantized keys and values.

    Returns:
        A ``Cache`` of Transformers. Layers whose keys and values are not quantized, and those that
        keep a window of tokens only, store them as Transformers does.

    Raises:
        ConfigError: No attention layer is quantized, or one has a scale that is not calibrated.
    """
    hf = transformers_package()
    attentions: dict[int, KvAttentionForward] = {
        m.__dict__["layer_idx"]: m
        for m in model.modules()
        if isinstance(m, KvAttentionForward) and m.key_quantizer is not None
    }
    if not attentions:
        raise ConfigError(
            f"No attention layer of this {type(model).__name__} has quantized keys and values. "
            "Apply mode 'quantize' with a scheme such as 'kv8' first."
        )
    config: Any = getattr(model, "config", None)
    made = hf.DynamicCache(config=config)
    plain = hf.cache_utils.DynamicLayer
    count = max(len(made.layers), *(index + 1 for index in attentions))
    layers = [*made.layers, *(plain() for _ in range(count - len(made.layers)))]
    for index, attention in attentions.items():
        if type(layers[index]) is plain:
            packers = [_packer(q) for q in (attention.key_quantizer, attention.value_quantizer)]
            layers[index] = _layer_class()(*packers)
    return hf.Cache(layers=layers)


def cache_bytes(cached: Any) -> int:
    """Return the bytes of all keys and values in a cache of Transformers."""
    held = [tensor for layer in cached.layers for tensor in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


def _packer(quantizer: Quantizer | None) -> TokenPacker:
    if quantizer is None:
        raise ConfigError("keys and values must both be quantized.")
    return TokenPacker(activation_spec(quantizer), quantizer.scale, quantizer.zero_point)


@cache
def _layer_class() -> Any:
    """Return the class of a layer of the cache, derived from that of Transformers."""
    base: Any = transformers_package().cache_utils.DynamicLayer

    class PackedLayerCache(base):  # type: ignore[misc]
        """Keys and values of one layer, as rows of bytes ``[batch, heads, tokens, width]``."""

        def __init__(self, keys: TokenPacker, values: TokenPacker) -> None:
            super().__init__()
            self._packers = keys, values

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            self.device, self._dtype = key_states.device, key_states.dtype
            self._features = key_states.shape[-1], value_states.shape[-1]
            empty = [
                state.new_empty(
                    (*state.shape[:2], 0, packer.width(state.shape[-1])), dtype=torch.uint8
                )
                for packer, state in zip(self._packers, (key_states, value_states), strict=True)
            ]
            self.keys, self.values = empty
            self.is_initialized = True

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            keys, values = self._packers
            self.keys = torch.cat([self.keys, keys.pack(key_states)], dim=-2)
            self.values = torch.cat([self.values, values.pack(value_states)], dim=-2)
            return (
                mark_quantized(keys.unpack(self.keys, self._features[0], self._dtype)),
                mark_quantized(values.unpack(self.values, self._features[1], self._dtype)),
            )

    return PackedLayerCache
