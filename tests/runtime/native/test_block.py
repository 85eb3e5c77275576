# SPDX-License-Identifier: Apache-2.0
"""A block by the kernel library under each instruction set, and what it is made of."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modewright.errors import KernelError
from modewright.runtime.native.between import AttentionStruct
from modewright.runtime.native.block import NativeBlock
from modewright.runtime.native.library import DTYPES, ISAS, Library, NativeWeight, library
from modewright.runtime.packed_weight import PackedWeight
from support.kernel_library import each_isa, needs_library
from support.packed_weights import group, random_weight

pytestmark = needs_library
WIDTH, HEADS, KV_HEADS, FEATURES, INNER = 128, 4, 2, 32, 192
Turn = tuple[torch.Tensor, torch.Tensor]


def loaded() -> Any:
    return cast(Library, library()).loaded


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@each_isa
@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("features", [16, 48, 80])
def test_a_turn_is_its_formula(isa: str, texts: int, features: int) -> None:
    query, key = numbers(texts, 6, features), numbers(texts, 2, features, seed=2)
    cos, sin = numbers(2, texts, 1, features, seed=3)
    expected = [turned(x.double(), cos.double(), sin.double()) for x in (query, key)]
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded().mw_rotate.argtypes = [*[pointer] * 4, *[size] * 5, ctypes.c_int]
    pointers = (query.data_ptr(), key.data_ptr(), cos.data_ptr(), sin.data_ptr())
    loaded().mw_rotate(*pointers, texts, 6, 2, features, features, ISAS.index(isa))

    assert torch.allclose(query.double(), expected[0], atol=1e-6)
    assert torch.allclose(key.double(), expected[1], atol=1e-6)


def attend_next(
    isa: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, threads: int = 1
) -> torch.Tensor:
    texts, heads, features = query.shape
    out = torch.empty(texts, heads, features)
    struct = AttentionStruct(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), None),
        *(texts, heads, key.shape[1], key.shape[2], features),
        *query.stride(),
        *key.stride()[:3],
        *value.stride()[:3],
        *(0.25, DTYPES[key.dtype]),
    )
    loaded().mw_attend_next.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    assert loaded().mw_attend_next(ctypes.addressof(struct), ISAS.index(isa), threads) == 0
    return out


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(shared, 1) for x in (key, value))
    scores = torch.einsum("bhf,bhtf->bht", query.double(), key) * 0.25
    return torch.einsum("bht,bhtf->bhf", scores.softmax(-1), value)


@each_isa
@given(
    texts=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 9),
    tokens=st.integers(1, 70),
    features=st.sampled_from([16, 64, 80]),
    size=st.sampled_from([0.1, 3.0, 30.0]),
    dtype=st.sampled_from(list(DTYPES)),
)
@settings(max_examples=60, deadline=None)
def test_attention_of_the_next_token_is_its_formula(
    isa: str,
    texts: int,
    kv_heads: int,
    shared: int,
    tokens: int,
    features: int,
    size: float,
    dtype: torch.dtype,
) -> None:
    query = numbers(texts, kv_heads * shared, features) * size
    key = numbers(texts, kv_heads, tokens, features, seed=2).to(dtype)
    value = numbers(texts, tokens, kv_heads, features, seed=3).transpose(1, 2).to(dtype)

    found = attend_next(isa, query, key, value)

    assert torch.allclose(found.double(), attention(query, key, value), atol=2e-5)


def test_many_tokens_on_several_threads() -> None:
    query, key = numbers(2, 8, 64), numbers(2, 4, 5000, 64, seed=2)
    value = numbers(2, 4, 5000, 64, seed=3)
    one = attend_next("scalar", query, key, value)

    assert torch.allclose(one.double(), attention(query, key, value), atol=1e-5)
    assert torch.equal(attend_next("scalar", query, key, value, threads=3), one)


class Parts:
    """The weights of a block, and what it computes in float64."""

    def __init__(
        self,
        fmt: str,
        fields: dict[str, Any],
        with_bias: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shapes = [(HEADS * FEATURES, WIDTH), (KV_HEADS * FEATURES, WIDTH)]
        shapes += [shapes[1], (WIDTH, HEADS * FEATURES)]
        shapes += [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
        self.weights = [random_weight(fmt, *shape, **fields) for shape in shapes]
        some = [(numbers(n, seed=9) * 0.1).to(dtype) for n, _ in shapes]
        self.biases = [bias if with_bias else None for bias in some]
        self.inputs: list[tuple[str | None, torch.Tensor | None]] = [(None, None)] * 7
        first, second = 0.1 + 0.01 * numbers(2, WIDTH, seed=4).to(dtype)
        self.norms = (first.contiguous(), second.contiguous())

    def native(self, isa: str) -> NativeBlock:
        kernels = cast(Library, library())
        weights = [NativeWeight(weight, kernels) for weight in self.weights]
        return NativeBlock(
            *(weights, self.biases, self.inputs, self.norms, (1e-5, 1e-6), FEATURES, 0.25, isa)
        )

    def exact(
        self, x: torch.Tensor, turn: Turn, past: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        def multiply(place: int, x: torch.Tensor) -> torch.Tensor:
            weight: PackedWeight = self.weights[place]
            bias = self.biases[place]
            return F.linear(
                x, weight.dequantize().double(), None if bias is None else bias.double()
            )

        x = x.double()
        cos, sin = (part[:, :, None].double() for part in turn)
        normed = F.rms_norm(x, (WIDTH,), self.norms[0].double(), 1e-5)
        heads = [multiply(n, normed).view(len(x), 1, -1, FEATURES) for n in range(3)]
        query, key = turned(heads[0], cos, sin), turned(heads[1], cos, sin)
        keys = torch.cat((past[0].double(), key.transpose(1, 2)), 2)
        values = torch.cat((past[1].double(), heads[2].transpose(1, 2)), 2)
        seen = attention(query[:, 0], keys, values).view(len(x), 1, -1)
        hidden = x + multiply(3, seen)
        normed = F.rms_norm(hidden, (WIDTH,), self.norms[1].double(), 1e-6)
        return hidden + multiply(6, F.silu(multiply(4, normed)) * multiply(5, normed))


@each_isa
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("texts", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_is_its_formula(isa: str, texts: int, with_bias: bool, dtype: torch.dtype) -> None:
    parts = Parts("int8", {}, with_bias, dtype)
    x = numbers(texts, 1, WIDTH).to(dtype)
    cos, sin = numbers(2, texts, 1, FEATURES, seed=6).to(dtype)
    past = tuple(numbers(2, texts, KV_HEADS, 20, FEATURES, seed=7).to(dtype))
    kept = []

    def update(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept.append((key.shape, key.dtype, value.dtype))
        return torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)

    found = parts.native(isa).next_token(x, cos, sin, update)

    expected = parts.exact(x, (cos, sin), (past[0], past[1]))
    assert kept == [((texts, KV_HEADS, 1, FEATURES), dtype, dtype)]
    assert found.dtype == dtype
    # inputs are rounded to int8 before each of the products
    assert (found - expected).norm() <= 3e-2 * expected.norm()


@each_isa
@pytest.mark.parametrize("texts", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_are_written_where_there_is_room(
    isa: str, texts: int, dtype: torch.dtype
) -> None:
    block, tokens, room = Parts("uint4", group(64), True, dtype).native(isa), 20, 24
    x = numbers(texts, 1, WIDTH).to(dtype)
    cos, sin = numbers(2, texts, 1, FEATURES, seed=6).to(dtype)
    keys, values = numbers(2, texts, KV_HEADS, room, FEATURES, seed=7).to(dtype)
    expected = [keys.clone(), values.clone()]

    def update(*new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for tensor, part in zip(expected, new, strict=True):
            tensor[:, :, tokens - 1 : tokens] = part
        return expected[0][:, :, :tokens], expected[1][:, :, :tokens]

    result = block.next_token(x, cos, sin, update)
    found = block.append_token(x, cos, sin, keys, values, tokens)

    assert torch.equal(found, result)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def test_inputs_that_are_quantized_take_their_scales() -> None:
    parts = Parts("int8", {}, False)
    x, (cos, sin) = numbers(2, 1, WIDTH), numbers(2, 1, 1, FEATURES, seed=6)
    none = torch.zeros(2, KV_HEADS, 0, FEATURES)
    expected = parts.exact(x, (cos, sin), (none, none))
    errors = []
    for scale in (3e-3, 1e-4):  # with the second one, values saturate
        parts.inputs = [("int8_token", None)] * 7
        parts.inputs[2] = ("int8_tensor", torch.tensor([[scale]]))
        block = parts.native("scalar")
        found = block.next_token(x, cos, sin, lambda key, value: (key, value))
        errors.append(float((found - expected).norm() / expected.norm()))

    assert errors[0] <= 3e-2
    assert errors[1] >= 0.3


def test_texts_that_stand_at_the_same_place_share_a_turn() -> None:
    block = Parts("uint4", group(64), False).native("scalar")
    x, (cos, sin) = numbers(3, 1, WIDTH), numbers(2, 1, 1, FEATURES, seed=6)

    one = block.next_token(x, cos, sin, lambda key, value: (key, value))
    each = block.next_token(
        x, cos.repeat(3, 1, 1), sin.repeat(3, 1, 1), lambda key, value: (key, value)
    )

    assert torch.equal(one, each)


def test_weights_that_do_not_fit_are_named() -> None:
    if "avx2" not in cast(Library, library()).isas:
        pytest.skip("this CPU has no AVX2")
    block = Parts("uint4", group(6), False).native("avx2")
    x, (cos, sin) = numbers(1, 1, WIDTH), numbers(2, 1, 1, FEATURES, seed=6)

    with pytest.raises(KernelError, match="groups of a weight do not fit"):
        block.next_token(x, cos, sin, lambda key, value: (key, value))


def test_keys_of_other_texts_are_refused() -> None:
    block = Parts("int8", {}, False).native("scalar")
    x, (cos, sin) = numbers(2, 1, WIDTH), numbers(2, 1, 1, FEATURES, seed=6)

    with pytest.raises(KernelError, match=r"expected keys and values \[2, 2, tokens, 32\]"):
        block.next_token(x, cos, sin, lambda key, value: (key[:1], value[:1]))


def test_what_a_cache_holds_otherwise_is_converted() -> None:
    block = Parts("int8", {}, False).native("scalar")
    x, (cos, sin) = numbers(2, 1, WIDTH), numbers(2, 1, 1, FEATURES, seed=6)
    expected = block.next_token(x, cos, sin, lambda key, value: (key, value))
    found = block.next_token(
        *(x, cos, sin), lambda key, value: (key.double(), value.mT.contiguous().mT)
    )

    assert torch.equal(found, expected)


def test_tensors_that_were_moved_are_found() -> None:
    parts = Parts("int8", {}, True)
    block = parts.native("scalar")
    x, (cos, sin) = numbers(1, 1, WIDTH), numbers(2, 1, 1, FEATURES, seed=6)
    expected = block.next_token(x, cos, sin, lambda key, value: (key, value))
    for tensor in (*parts.norms, *parts.biases):
        assert tensor is not None
        moved = tensor.clone()
        tensor.data.fill_(torch.nan)
        tensor.data = moved
    for weight in parts.weights:
        for tensor in (weight.packed, weight.scale):
            moved = tensor.clone()
            tensor.data.fill_(0)
            tensor.data = moved

    assert torch.equal(block.next_token(x, cos, sin, lambda key, value: (key, value)), expected)
