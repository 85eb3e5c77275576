# SPDX-License-Identifier: Apache-2.0
"""The keys and values of a text that grows, with room for what comes.

For each token the dynamic cache of Transformers joins all keys and values with the new ones, which
copies them all: from a thousand tokens on that takes longer than the products of a packed model.
Here what the cache holds are the first tokens of larger tensors, into which the next ones are
written. The cache stays what it was: whoever cuts, reorders or replaces its tensors is noticed, and
nothing that was ever taken from it is written to.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

_ROOM = "_modewright_room"  # the attribute of a cache's layer that holds the larger tensors
_PART = 4  # of the tokens that there are is how many there is room for,
_FEWEST = 64  # or so many


class Room:
    """Larger tensors than a layer of a cache holds.

    Attributes:
        keys: ``[texts, heads, room, features]``.
        values: As ``keys``.
        kind: What they are like, see :func:`kind_of`.
        tokens: How many of them the layer has: the first ones.
    """

    __slots__ = ("_held_keys", "_held_values", "_size", "keys", "kind", "tokens", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy what a layer holds."""
        self.kind, self.tokens = kind_of(keys), keys.shape[2]
        self._size = self.tokens + max(self.tokens // _PART, _FEWEST)
        self.keys, self.values = (_enlarged(held, self._size) for held in (keys, values))
        self._held_keys, self._held_values = keys, values

    def fits(self, layer: Any) -> bool:
        """Whether a layer has what it was given last, and there is room that may be written to."""
        return (
            self._held_keys is layer.keys
            and self._held_values is layer.values
            and self.tokens < self._size
            and (not self.keys.is_inference() or torch.is_inference_mode_enabled())
        )

    def grow(self, layer: Any) -> None:
        """Give a layer one token more, which was written behind those that it has."""
        self.tokens += 1
        layer.keys = self._held_keys = self.keys.narrow(2, 0, self.tokens)
        layer.values = self._held_values = self.values.narrow(2, 0, self.tokens)


def kind_of(keys: torch.Tensor) -> tuple[int, int, int, torch.dtype, torch.device]:
    """Return what tensors that belong together have in common: all but the number of tokens."""
    texts, heads, _, features = keys.shape
    return texts, heads, features, keys.dtype, keys.device


def room_of(cache: Any, layer: Any, kind: tuple[Any, ...]) -> Room | None:
    """Return where the next key and value of a layer may be written.

    Args:
        cache: A cache of Transformers, of any kind.
        layer: One of its layers.
        kind: What the next key is like.

    Returns:
        ``None`` if the layer does something else than to join them, or holds nothing like them.
    """
    room: Room | None = layer.__dict__.get(_ROOM)
    if room is None or not room.fits(layer):
        if type(layer).__name__ != "DynamicLayer" or getattr(cache, "offloading", False):
            return None
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not _is_plain(keys) or not _is_plain(values) or keys.shape != values.shape:
            return None
        if not kind_of(keys) == kind_of(values) == kind:
            return None
        room = layer.__dict__[_ROOM] = Room(keys, values)
    return room if room.kind == kind else None


def _is_plain(held: object) -> TypeGuard[torch.Tensor]:
    return type(held) is torch.Tensor and held.dim() == 4 and not held.requires_grad


def _enlarged(held: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a copy of what a cache holds with room for so many tokens."""
    texts, heads, count, features = held.shape
    made = held.new_empty(texts, heads, tokens, features)
    made[:, :, :count] = held
    return made
