# SPDX-License-Identifier: Apache-2.0
"""The keys and values of a text that grows, with room for what comes.

For each token the dynamic cache of Transformers joins all keys and values with the new ones, which
copies them all: from a thousand tokens on that takes longer than the products of a packed model.
Here what the cache holds are the first tokens of larger tensors, into which the next ones are
written. The cache stays what it was: whoever cuts, reorders or replaces its tensors is noticed, and
nothing that was ever taken from it is written to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_ROOM = "_modewright_room"  # the attribute of a cache's layer that holds the larger tensors
_MANY = 192  # tokens, from which on copying them takes longer than finding out where to write
_PART = 4  # of the tokens that there are is how many there is room for


class _Room(NamedTuple):
    """Larger tensors, ``[texts, heads, room, features]``, and what the cache has of them."""

    keys: torch.Tensor
    values: torch.Tensor
    held_keys: torch.Tensor
    held_values: torch.Tensor


def append(
    cache: Any, place: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a token to a cache and return the keys and values of all tokens, as its ``update`` does.

    Args:
        cache: A cache of Transformers, of any kind.
        place: Of the layer.
        key: ``[texts, heads, 1, features]``.
        value: As ``key``.

    Returns:
        ``[texts, heads, tokens, features]`` each, features side by side.
    """
    layer = _growing_layer(cache, place, key)
    if layer is None:
        found: tuple[torch.Tensor, torch.Tensor] = cache.update(key, value, place)
        return found
    tokens = layer.keys.shape[2]
    room: _Room | None = layer.__dict__.get(_ROOM)
    if room is None or not _fits(room, layer, tokens):
        more = tokens + tokens // _PART
        keys, values = (_enlarged(held, more) for held in (layer.keys, layer.values))
    else:
        keys, values = room.keys, room.values
    keys.narrow(2, tokens, 1).copy_(key)
    values.narrow(2, tokens, 1).copy_(value)
    held = keys.narrow(2, 0, tokens + 1), values.narrow(2, 0, tokens + 1)
    layer.keys, layer.values = held
    layer.__dict__[_ROOM] = _Room(keys, values, *held)
    return held


def _growing_layer(cache: Any, place: int, key: torch.Tensor) -> Any:
    """Return the layer of a cache that would join long tensors and do nothing else, or ``None``."""
    layers = getattr(cache, "layers", ())
    if place >= len(layers) or getattr(cache, "offloading", False):
        return None
    layer = layers[place]
    keys = getattr(layer, "keys", None)
    if type(layer).__name__ != "DynamicLayer" or not isinstance(keys, torch.Tensor):
        return None
    if keys.dim() != 4 or keys.shape[2] < _MANY:
        return None
    alike = keys.shape[:2] == key.shape[:2] and keys.dtype is key.dtype
    return layer if alike and keys.device == key.device and not keys.requires_grad else None


def _fits(room: _Room, layer: Any, tokens: int) -> bool:
    """Whether a layer has what it was given last, and there is room that may be written to."""
    return (
        room.held_keys is layer.keys
        and room.held_values is layer.values
        and tokens < room.keys.shape[2]
        and (not room.keys.is_inference() or torch.is_inference_mode_enabled())
    )


def _enlarged(held: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a copy of what a cache holds with room for so many tokens."""
    texts, heads, count, features = held.shape
    made = held.new_empty(texts, heads, tokens, features)
    made[:, :, :count] = held
    return made
