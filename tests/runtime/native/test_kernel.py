# SPDX-License-Identifier: Apache-2.0
"""The own kernel, under each instruction set that this CPU has, against slow exact arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modewright.runtime.backends.base import Case
from modewright.runtime.backends.native import Native
from modewright.runtime.backends.portable import portable_linear
from modewright.runtime.packed_weight import PackedWeight
from support.kernel_library import each_isa, needs_library
from support.packed_weights import E4M3, E8M0, group, random_weight

pytestmark = needs_library
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]
GRANULARITIES: dict[str, dict[str, Any]] = {
    "group 16": group(16),
    "group 64": group(64),
    "group 96": group(96),
    "group 128, float32": group(128, scale_dtype="float32"),
    "channel": {},
    "tensor": {"granularity": "tensor"},
    "block": {"granularity": "block", "block_size": (16, 128)},
    "mx": group(32, **E8M0),
    "nv": group(16, **E4M3),
}


def run(
    weight: PackedWeight,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str | None = None,
    act_scale: torch.Tensor | None = None,
    **made: Any,
) -> torch.Tensor:
    backend = Native(**made)
    problem = backend.refuses(Case(weight.spec, "cpu", x.dtype, act, len(x)))
    assert problem is None
    return backend.linear(x, backend.prepare(weight), bias, act, act_scale)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_within_rounding(weight: PackedWeight, x: torch.Tensor, y: torch.Tensor) -> None:
    """An activation moves by half a step at most; a step is at most amax / 127 of its row."""
    dense = weight.dequantize().double()
    exact = F.linear(x.double(), dense)
    step = x.double().abs().amax(-1, keepdim=True) / 127
    reach = dense.abs().sum(-1)
    bound = step * 0.501 * reach + 1e-5 * x.double().abs().sum(-1, keepdim=True) * dense.abs().max()
    assert ((y.double() - exact).abs() <= bound + 1e-30).all()


@each_isa
@pytest.mark.parametrize("fields", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("fmt", [*INTEGERS, "fp4_e2m1", "fp6_e2m3"])
def test_int8_activations_of_the_scheme_are_multiplied_as_the_portable_backend_does(
    fmt: str, fields: dict[str, Any], isa: str
) -> None:
    for n, k, rows in ((17, 256, 1), (33, 200, 3), (5, 7, 2), (48, 576, 14)):
        weight = random_weight(fmt, n, k, **fields)
        x, bias = numbers(rows, k), numbers(n, seed=2)
        if Native(isa).refuses(Case(weight.spec, "cpu", x.dtype, "int8_token", rows)):
            assert fields.get("group_size") in (16, 96)  # too small or odd for these registers
            continue

        y = run(weight, x, bias, "int8_token", isa=isa)

        expected = portable_linear(x, weight, bias, "int8_token", None)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@each_isa
@settings(max_examples=60)
@given(st.data())
def test_rounding_of_activations_is_the_only_error(isa: str, data: st.DataObject) -> None:
    fmt = data.draw(st.sampled_from([*INTEGERS, "fp4_e2m1", "fp6_e2m3"]))
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    rows = data.draw(st.integers(1, 20))
    fields = data.draw(st.sampled_from([group(32), group(64), group(128), {}, group(64, **E8M0)]))
    weight = random_weight(fmt, n, k, seed=data.draw(st.integers(0, 9)), **fields)
    x = numbers(rows, k, seed=data.draw(st.integers(0, 9)))
    x *= 10.0 ** data.draw(st.integers(-30, 30))
    if data.draw(st.booleans()):
        x[0, k // 2] = 1e4 * x.abs().max()  # an outlier
    if data.draw(st.booleans()):
        x[:, : k // 3] = 0

    assert_within_rounding(weight, x, run(weight, x, isa=isa))


@each_isa
@pytest.mark.parametrize("fmt", ["int2", "int3", "int4", "uint4", "int8", "fp4_e2m1"])
def test_two_terms_make_the_error_four_hundred_times_smaller(fmt: str, isa: str) -> None:
    weight = random_weight(fmt, 48, 576, **group(64))
    x = numbers(5, 576)
    exact = F.linear(x.double(), weight.dequantize().double())

    one, two = (run(weight, x, isa=isa, terms=terms).double() for terms in (1, 2))

    assert (one - exact).norm() < 1e-2 * exact.norm()
    assert (two - exact).norm() < 5e-5 * exact.norm()


@each_isa
@pytest.mark.parametrize("rows", [1, 2, 9, 30])
def test_integers_times_integers_are_exact(rows: int, isa: str) -> None:
    spec_scale = 0.5
    weight = random_weight("int8", 33, 300)
    weight.scale.fill_(spec_scale)
    whole = torch.randint(-128, 128, (rows, 300), generator=torch.Generator().manual_seed(3))
    codes = weight.codes().view(torch.int8).long()

    y = run(weight, whole.float() / 4, None, "int8_tensor", torch.tensor([[0.25]]), isa=isa)

    assert torch.equal(y.double(), (whole @ codes.T).double() * spec_scale / 4)


@each_isa
@given(data=st.data())
def test_activations_become_the_codes_that_division_gives(isa: str, data: st.DataObject) -> None:
    weight = random_weight("int8", 64, 64)
    codes = torch.eye(64, dtype=torch.uint8)
    one = PackedWeight.from_codes(weight.spec, codes, torch.ones_like(weight.scale), None, None)
    bits = data.draw(st.integers(0x00800000, 0x7F7FFFFF))  # of any normal number
    unit = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    seeded = torch.Generator().manual_seed(bits)
    x = torch.randint(-300, 300, (20, 64), generator=seeded) / 2 * unit  # ties
    x = torch.nextafter(x, x + unit * torch.randint(-1, 2, x.shape, generator=seeded))
    x = x.clamp(torch.finfo().min, torch.finfo().max)
    expected = (x / unit).round().clamp(-128, 127)

    y = run(one, x, None, "int8_tensor", unit, isa=isa)

    assert torch.equal(y, expected * unit)


@each_isa
@pytest.mark.parametrize("rows", [15, 16, 17, 31, 32, 33, 64, 77])
@pytest.mark.parametrize("fields", [group(64), group(128), {}], ids=["group 64", "128", "channel"])
@pytest.mark.parametrize("fmt", ["int4", "uint4", "uint2", "int3", "int8", "uint8"])
def test_all_rows_and_outputs_of_tiles_that_are_full_or_cut_off(
    fmt: str, fields: dict[str, Any], rows: int, isa: str
) -> None:
    for outputs, inputs in ((49, 256), (16, 576)):
        weight = random_weight(fmt, outputs, inputs, **fields)
        x = numbers(rows, inputs)

        y = run(weight, x, None, "int8_token", isa=isa)

        exact = portable_linear(x.double(), weight, None, "int8_token", None)
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.std()))
        assert_within_rounding(weight, x, run(weight, x, isa=isa))


@each_isa
def test_a_row_that_is_not_finite_gives_a_row_of_nan_and_no_other(isa: str) -> None:
    weight = random_weight("int4", 20, 128, **group(64))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for act in (None, "int8_token"):
            x = numbers(12, 128)
            x[3, 100] = bad

            y = run(weight, x, None, act, isa=isa)

            assert y[3].isnan().all()
            assert y[[0, 1, 2, 4, 11]].isfinite().all()


@each_isa
def test_under_a_given_scale_infinity_saturates_and_nan_stays(isa: str) -> None:
    weight, scale = random_weight("int8", 20, 128), torch.tensor([[0.03]])
    x = numbers(3, 128)
    x[0, 5], x[1, 5] = torch.inf, torch.nan

    y = run(weight, x, None, "int8_tensor", scale, isa=isa)

    expected = portable_linear(x, weight, None, "int8_tensor", scale)
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-3)
    assert y[1].isnan().all()


@each_isa
def test_zeros_give_the_bias(isa: str) -> None:
    weight, bias = random_weight("uint3", 20, 100, **group(64)), numbers(20)

    assert torch.equal(run(weight, torch.zeros(2, 100), bias, isa=isa)[1], bias)
    assert torch.equal(run(weight, torch.full((1, 100), 1e-44), bias, isa=isa)[0], bias)


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 9, 77])
def test_half_precision_is_converted_on_the_way(dtype: torch.dtype, rows: int, isa: str) -> None:
    for fields in (group(32), group(64), {}):
        weight = random_weight("int4", 83, 192, **fields)
        x, bias = numbers(rows, 192).to(dtype), numbers(83).to(dtype)
        x[1, 100] = torch.nan

        for added in (bias, None):
            y = run(weight, x, added, isa=isa)

            assert y.dtype == dtype
            exact = run(weight, x.float(), None if added is None else added.float(), isa=isa)
            assert torch.equal(y.nan_to_num(), exact.to(dtype).nan_to_num())
            assert y.isnan().all(1).tolist() == [row == 1 for row in range(rows)]


@each_isa
def test_any_leading_shape_and_no_rows_at_all(isa: str) -> None:
    weight, x = random_weight("int4", 16, 64, **group(32)), numbers(2, 3, 64)

    y = run(weight, x, isa=isa)

    assert torch.equal(y.reshape(6, 16), run(weight, x.reshape(6, 64), isa=isa))
    assert run(weight, x[:0], isa=isa).shape == (0, 3, 16)
    torch.testing.assert_close(run(weight, x[:, 1], isa=isa), y[:, 1])  # not contiguous
    torch.testing.assert_close(run(weight, x[0, 0], isa=isa), y[0, 0])


@each_isa
@pytest.mark.parametrize("act", ["int8_token", "int8_tensor"])
@pytest.mark.parametrize("rows", [3, 16, 17, 50, 256, 257])
def test_codes_of_8_bits_with_one_scale_for_a_row(rows: int, act: str, isa: str) -> None:
    scale = torch.tensor([[0.02]]) if act == "int8_tensor" else None
    for fmt, n, k in (
        ("int8", 80, 64),
        ("int8", 80, 1100),
        ("int8", 83, 1024),
        ("uint8", 48, 1088),
        ("int8", 96, 576),
        ("int8", 112, 512),
    ):
        weight, x, bias = random_weight(fmt, n, k), numbers(rows, k), numbers(n)

        y = run(weight, x, bias, act, scale, isa=isa)

        exact = portable_linear(x.double(), weight, bias.double(), act, scale)
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.std()))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(run(weight, x, bias, act, scale, isa=isa), y)
        finally:
            torch.set_num_threads(threads)
        half = x.bfloat16()
        whole = run(weight, half.float(), bias, act, scale, isa=isa)
        assert torch.equal(run(weight, half, bias, act, scale, isa=isa), whole.bfloat16())


def test_more_rows_than_one_part_holds() -> None:
    weight, x = random_weight("int4", 24, 64, **group(32)), numbers(2500, 64)

    assert_within_rounding(weight, x, run(weight, x))


@each_isa
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_change_nothing(rows: int, isa: str) -> None:
    weight, x = random_weight("int4", 333, 256, **group(64)), numbers(rows, 256)
    alone = run(weight, x, isa=isa)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(run(weight, x, isa=isa), alone) for _ in range(20))
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(lambda _: run(weight, x, isa=isa), range(20)))
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(y, alone) for y in results)


def test_tensors_that_were_moved_are_found_again() -> None:
    weight, x = random_weight("int4", 32, 64, **group(32)), numbers(2, 64)
    backend = Native()
    prepared = backend.prepare(weight)
    before = backend.linear(x, prepared, None, None, None)
    for tensor in weight.tensors().values():
        tensor.share_memory_()

    assert torch.equal(backend.linear(x, prepared, None, None, None), before)
