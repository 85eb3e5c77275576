# SPDX-License-Identifier: Apache-2.0
"""A cache that grows in place holds what one that joins tensors would, whatever is done to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modewright.runtime.layers.fused.growing import kind_of, room_of

transformers = pytest.importorskip("transformers")
FEATURES = 4


def token(texts: int = 2, heads: int = 3, count: int = 1, seed: int = 0) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, texts, heads, count, FEATURES, generator=made))


def filled(count: int = 200, **options: Any) -> Any:
    cache = transformers.DynamicCache(**options)
    cache.update(*token(count=count, seed=99), 0)
    return cache


def append(
    cache: Any, place: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a token as a block does; return the keys and values of all."""
    layers = getattr(cache, "layers", ())
    layer = layers[place] if place < len(layers) else None
    room = None if layer is None else room_of(cache, layer, kind_of(key))
    if room is None:
        found: tuple[torch.Tensor, torch.Tensor] = cache.update(key, value, place)
        return found
    for own, new in ((room.keys, key), (room.values, value)):
        own.narrow(2, room.tokens, 1).copy_(new)
    room.grow(layer)
    return layer.keys, layer.values


def held(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layer = cache.layers[0]
    return layer.keys, layer.values


def crop(cache: Any) -> Any:
    for part in cache.layers:
        part.keys, part.values = part.keys[..., :-1, :], part.values[..., :-1, :]
    return cache


def reorder(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def prompt(cache: Any) -> Any:
    cache.update(*token(count=3, seed=77), 0)
    return cache


ACTIONS: dict[str, Any] = {
    "crop": crop,
    "reorder": reorder,
    "prompt": prompt,
    "copy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@given(actions=st.lists(st.sampled_from(["token"] * 4 + list(ACTIONS)), max_size=30))
@settings(max_examples=150, deadline=None)
def test_it_holds_what_joining_gives(actions: list[str]) -> None:
    cache, plain = filled(), filled()
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for number, action in enumerate(actions):
            if action == "token":
                found = append(cache, 0, *token(seed=number))
                expected = plain.update(*token(seed=number), 0)
                assert all(map(torch.equal, found, expected))
            else:
                cache, plain = (ACTIONS[action](own) for own in (cache, plain))
            assert all(map(torch.equal, held(cache), held(plain)))
            assert cache.get_seq_length() == plain.get_seq_length()
            taken += [(tensor, tensor.clone()) for tensor in held(cache)]
    assert all(torch.equal(view, before) for view, before in taken)  # nobody's tensors change


def test_tokens_are_written_and_nothing_is_copied_until_there_is_no_room() -> None:
    cache = filled(800)
    places = []
    with torch.inference_mode():
        for number in range(450):
            places.append(append(cache, 0, *token(seed=number))[0].data_ptr())

    assert len(set(places[:200])) == len(set(places[200:])) == 1  # room for 200, then for 250
    assert cache.get_seq_length() == 1250


def test_caches_that_begin_alike_do_not_share_what_follows() -> None:
    first = filled()
    with torch.no_grad():
        append(first, 0, *token(seed=1))
        second = transformers.DynamicCache()
        second.update(*held(first), 0)
        second.layers[0].keys, second.layers[0].values = held(first)
        one = append(first, 0, *token(seed=2))
        other = append(second, 0, *token(seed=3))

    assert torch.equal(one[0][:, :, -1:], token(seed=2)[0])
    assert torch.equal(other[0][:, :, -1:], token(seed=3)[0])
    assert torch.equal(one[0][:, :, :-1], other[0][:, :, :-1])


def test_what_inference_mode_made_is_not_written_to_outside() -> None:
    cache = filled()
    with torch.inference_mode():
        append(cache, 0, *token(seed=1))
    with torch.no_grad():
        keys, _ = append(cache, 0, *token(seed=2))

    assert keys.shape[2] == 202
    assert torch.equal(keys[:, :, -1:], token(seed=2)[0])


def test_short_texts_get_room_for_some_tokens() -> None:
    cache = filled(5)
    with torch.no_grad():
        places = {append(cache, 0, *token(seed=number))[0].data_ptr() for number in range(64)}

    assert len(places) == 1
    assert cache.get_seq_length() == 69


CASES = ["empty", "values of another size", "sliding", "another dtype", "gradient", "foreign"]


@pytest.mark.parametrize("case", CASES)
def test_other_caches_do_it_themselves(case: str) -> None:
    cache, place = filled(), 0
    if case == "empty":
        place = 1
    if case == "sliding":
        cache.layers = [transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=300)]
        cache.update(*token(count=250), 0)
    if case == "values of another size":
        cache.layers[0].values = cache.layers[0].values.repeat(1, 1, 2, 1)
    if case == "another dtype":
        cache.layers[0].keys, cache.layers[0].values = (t.double() for t in held(cache))
    if case == "gradient":
        cache.layers[0].keys.requires_grad_()
    if case == "foreign":
        cache = Foreign()
    keys, values = append(cache, place, *token(seed=1))

    assert torch.equal(keys[:, :, -1:].float(), token(seed=1)[0])
    assert torch.equal(values[:, :, -1:].float(), token(seed=1)[1])
    for layer in getattr(cache, "layers", ()):
        assert "_modewright_room" not in vars(layer)


class Foreign:
    """A cache that somebody wrote."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value
