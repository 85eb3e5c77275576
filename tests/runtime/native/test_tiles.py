# SPDX-License-Identifier: Apache-2.0
"""The kernel that multiplies in tiles, for every kind of code, against exact arithmetic."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from modewright.runtime.backends.activations import rounded
from modewright.runtime.backends.base import Case
from modewright.runtime.backends.native_tiles import NativeTiles, multiply_in_tiles
from modewright.runtime.native.library import DTYPES, Library, NativeWeight, library
from modewright.runtime.packed_weight import PackedWeight
from support.packed_weights import E4M3, E8M0, group, random_weight


def has_tiles() -> bool:
    found = library()
    return isinstance(found, Library) and found.has_tiles


needs_tiles = pytest.mark.skipif(not has_tiles(), reason="this CPU has no tiles for bfloat16")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "uint2 group 64": ("uint2", group(64)),
    "int3 group 32": ("int3", group(32)),
    "uint3 channel": ("uint3", {}),
    "int4 group 64": ("int4", group(64)),
    "uint4 group 64": ("uint4", group(64)),
    "uint4 group 160, float32": ("uint4", group(160, scale_dtype="float32")),
    "uint4 group 16": ("uint4", group(16)),
    "uint4 group 48": ("uint4", group(48)),
    "int4 tensor": ("int4", {"granularity": "tensor"}),
    "int4 block": ("int4", {"granularity": "block", "block_size": (16, 64)}),
    "uint5 group 96": ("uint5", group(96)),
    "int6 group 64": ("int6", group(64)),
    "int8 channel": ("int8", {}),
    "uint8 group 80": ("uint8", group(80)),
    "mxfp4": ("fp4_e2m1", group(32, **E8M0)),
    "nvfp4": ("fp4_e2m1", group(16, **E4M3)),
    "nf4": ("nf4", group(64)),
    "fp6_e2m3": ("fp6_e2m3", group(32, **E8M0)),
    "fp6_e3m2": ("fp6_e3m2", group(32, **E8M0)),
    "fp8_e4m3": ("fp8_e4m3", {}),
    "fp8_e5m2 group 48": ("fp8_e5m2", group(48)),
    "fp8_e5m2 channel": ("fp8_e5m2", {}),
    "fp8_e4m3 group 64": ("fp8_e4m3", group(64)),
    "fp8_e4m3 tensor": ("fp8_e4m3", {"granularity": "tensor"}),
    "int8 group 64": ("int8", group(64)),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(
    weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    backend = NativeTiles()
    return backend.linear(x, backend.prepare(weight), bias, None, None)


def kernel_weight(weight: PackedWeight) -> NativeWeight:
    return NativeWeight(weight, cast(Library, library()))


def check(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    found = product(weight, x, bias)

    dense = weight.dequantize().double()
    expected = F.linear(x.double(), dense, None if bias is None else bias.double())
    reach = F.linear(x.double().abs(), dense.abs()) + expected.abs()
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    # x and the scaled weight are rounded to 8 bits, and so is the result if that is what x is
    assert ((found - expected).abs() <= 2.0**-7 * 1.05 * reach).all()
    if expected.numel() >= 64:  # in fewer, what is added up can cancel
        assert (found - expected).norm() <= NativeTiles.accuracy * expected.norm()


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kind
def test_products_are_as_exact_as_bfloat16(
    kind: tuple[str, dict[str, Any]], dtype: torch.dtype
) -> None:
    for n, k, rows in ((33, 320, 40), (5, 77, 1), (64, 2240, 16), (17, 4200, 65)):
        weight = random_weight(kind[0], n, k, **kind[1])
        check(weight, numbers(rows, k).to(dtype), numbers(n, seed=2))


@needs_tiles
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    rows=st.integers(1, 70),
)
def test_any_shape(kind: str, n: int, k: int, rows: int) -> None:
    fmt, fields = KINDS[kind]
    check(random_weight(fmt, n, k, **fields), numbers(rows, k), None)


@needs_tiles
def test_more_rows_than_are_taken_at_a_time() -> None:
    weight = random_weight("uint4", 40, 2100, **group(64))
    check(weight, numbers(2, 700, 2100), numbers(40, seed=2))
    check(weight, numbers(2, 700, 2100).bfloat16(), None)


@needs_tiles
@pytest.mark.parametrize("rows", [16, 32, 33, 96])
def test_outputs_of_one_panel_are_added_to_by_later_inputs(rows: int) -> None:
    check(random_weight("int4", 32, 6400, **group(64)), numbers(rows, 6400), numbers(32, seed=2))


@needs_tiles
@each_kind
def test_each_code_stands_for_its_number(kind: tuple[str, dict[str, Any]]) -> None:
    weight = random_weight(kind[0], 48, 192, **kind[1])
    found = product(weight, torch.eye(192)).t()

    expected = weight.dequantize()
    assert ((found - expected).abs() <= 2.0**-8 * expected.abs()).all()


@needs_tiles
@pytest.mark.parametrize(
    "kind", ["int8 channel", "fp8_e4m3", "fp8_e4m3 tensor", "fp8_e5m2 channel"]
)
def test_codes_of_rows_with_one_scale_are_exact(kind: str) -> None:
    """bfloat16 holds them; the scale comes after."""
    fmt, fields = KINDS[kind]
    made = random_weight(fmt, 40, 256, **fields)
    special = {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7C}.get(fmt, 0x100)
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    codes[(codes & 0x7F) >= special] = 0  # what is no finite number
    scale = torch.rand(made.spec.scale_shape) + 0.5
    weight = PackedWeight.from_codes(made.spec, codes, scale)
    bias = numbers(40, seed=2)

    assert torch.equal(product(weight, torch.eye(256)).t(), weight.dequantize())
    found = product(weight, torch.eye(256), bias)
    assert torch.allclose(found.t(), weight.dequantize() + bias[:, None], rtol=1e-6, atol=1e-6)


@needs_tiles
def test_a_row_that_is_not_finite_does_not_reach_others() -> None:
    weight = random_weight("int4", 40, 128, **group(64))
    x = numbers(50, 128)
    expected = product(weight, x)
    x[7, 3], x[31, 0] = torch.nan, torch.inf

    found = product(weight, x)

    assert not found[[7, 31]].isfinite().any()
    rest = [row for row in range(50) if row not in (7, 31)]
    assert torch.equal(found[rest], expected[rest])


@needs_tiles
def test_any_number_of_threads_gives_the_same() -> None:
    weight, x = random_weight("int4", 200, 320, **group(64)), numbers(80, 320)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(product(weight, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_tiles
@pytest.mark.parametrize(
    ("fmt", "fields", "act", "rows", "reason"),
    [
        ("int7", {}, None, 512, "7 bits"),
        ("int3", group(16), None, 512, "groups of 16 are not whole halves of a tile"),
        ("uint4", group(40), None, 512, "groups of 40"),
        ("int4", group(128), None, 512, "groups of 128 are multiplied faster in int8"),
        ("uint4", group(128), "int8_token", 512, "groups of 128 are multiplied faster in int8"),
        ("uint4", group(64), "int8_token", 33, None),
        ("uint4", group(64), "int8_tensor", 32, "more than 32 rows"),
        ("uint8", group(64), None, 128, "more than 128 rows"),
        ("uint4", group(64), None, 32, "more than 32 rows"),
        ("fp4_e2m1", group(16, **E4M3), None, 32, "more than 32 rows"),
        ("nf4", group(64), None, 8, "more than 8 rows"),
        ("nf4", group(64), None, 9, None),
        ("fp8_e4m3", {}, "fp8_token", 9, None),
        ("fp4_e2m1", group(16, **E4M3), None, 33, None),
        ("uint4", group(128), None, 129, None),
        ("int4", group(64), None, 512, None),
    ],
)
def test_what_is_not_faster_in_tiles_is_left_to_others(
    fmt: str, fields: dict[str, Any], act: str | None, rows: int, reason: str | None
) -> None:
    spec = random_weight(fmt, 4, 1280, **fields).spec
    found = NativeTiles().refuses(Case(spec, "cpu", torch.float32, act, rows))

    assert found is None if reason is None else reason in str(found)


@needs_tiles
def test_codes_of_8_bits_are_unpacked_fast_where_inputs_are_few() -> None:
    narrow, wide = (
        NativeTiles().refuses(
            Case(random_weight("int8", 4, inputs).spec, "cpu", torch.float32, None, 33)
        )
        for inputs in (576, 1280)
    )

    assert narrow is None
    assert "more than 128 rows" in str(wide)


def test_without_tiles_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    if not isinstance(found, Library):
        pytest.skip(found)
    monkeypatch.setattr(found, "has_tiles", False)
    spec = random_weight("int4", 4, 256, **group(64)).spec

    assert NativeTiles().refuses(Case(spec, "cpu", torch.float32, None, 512)) is not None


@needs_tiles
@pytest.mark.parametrize("act", ["int8_token", "int8_tensor", "fp8_token", "fp8_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_rounded_on_the_way_to_what_their_format_leaves(
    act: str, dtype: torch.dtype
) -> None:
    scale = torch.tensor([[0.02]]) if act.endswith("tensor") else None
    for n, k, rows in ((33, 320, 40), (48, 77, 9), (40, 2112, 70)):
        weight, bias = random_weight("int4", n, k, **group(32)), numbers(n)
        x = (numbers(rows, k, seed=2) * torch.exp2(numbers(rows, 1, seed=3) * 3)).to(dtype)

        y = multiply_in_tiles(x, kernel_weight(weight), bias, act, scale)

        left = rounded(x if dtype in DTYPES else x.float(), act, scale)
        again = multiply_in_tiles(left, kernel_weight(weight), bias, None, None)
        assert torch.equal(y, again.to(dtype))
        exact = F.linear(left.double(), weight.dequantize().double(), bias.double())
        assert (y - exact).norm() <= NativeTiles.accuracy * exact.norm()


@needs_tiles
@pytest.mark.parametrize("act", ["int8_token", "fp8_token"])
def test_a_row_that_cannot_be_rounded_is_none_and_no_other(act: str) -> None:
    weight, x = random_weight("int4", 40, 96, **group(32)), numbers(50, 96)
    x[33, 95] = torch.nan

    y = multiply_in_tiles(x, kernel_weight(weight), None, act, None)

    assert y.isnan().any(1).tolist() == [row == 33 for row in range(50)]
