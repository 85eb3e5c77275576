# SPDX-License-Identifier: Apache-2.0
"""The kernel for fp8, nf4 and unpacking, under each instruction set, against exact arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from modewright.runtime.backends.base import Case
from modewright.runtime.backends.native_floats import NativeBfloat16, NativeFloats
from modewright.runtime.native.library import DTYPES, ISAS
from modewright.runtime.packed_weight import PackedWeight
from support.kernel_library import each_isa, needs_library
from support.packed_weights import E4M3, E8M0, group, random_weight

pytestmark = needs_library
FORMATS = ["fp8_e4m3", "fp8_e5m2", "nf4"]
GRANULARITIES: dict[str, dict[str, Any]] = {
    "group 32": group(32),
    "group 100, float32": group(100, scale_dtype="float32"),
    "channel": {},
    "tensor": {"granularity": "tensor"},
    "block": {"granularity": "block", "block_size": (16, 128)},
}


def product(
    weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None, isa: str | None = None
) -> torch.Tensor:
    backend = NativeFloats(isa)
    assert backend.refuses(Case(weight.spec, "cpu", x.dtype, None, len(x))) is None
    return backend.linear(x, backend.prepare(weight), bias, None, None)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_isa
@pytest.mark.parametrize("fields", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_few_rows_are_exact_to_float32(fmt: str, fields: dict[str, Any], isa: str) -> None:
    for n, k, rows in ((17, 256, 1), (33, 200, 3), (5, 70, 2), (48, 1000, 4)):
        weight = random_weight(fmt, n, k, **fields)
        x, bias = numbers(rows, k), numbers(n, seed=2)

        found = product(weight, x, bias, isa)

        dense = weight.dequantize().double()
        expected = F.linear(x.double(), dense, bias.double())
        reach = F.linear(x.double().abs(), dense.abs()) + bias.double().abs()
        assert ((found - expected).abs() <= 1e-5 * reach).all()


@each_isa
@pytest.mark.parametrize("fmt", FORMATS)
def test_many_rows_are_as_exact_as_bfloat16(fmt: str, isa: str) -> None:
    for k in (256, 77 if fmt != "nf4" else 78):
        weight, x = random_weight(fmt, 40, k), numbers(2, 19, k)

        found = product(weight, x, None, isa)

        expected = F.linear(x.double(), weight.dequantize().double())
        assert found.shape == (2, 19, 40)
        assert (found - expected).norm() <= 1e-2 * expected.norm()


@each_isa
@pytest.mark.parametrize(
    ("fmt", "torch_dtype"),
    [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_every_code_is_the_number_that_torch_reads(
    fmt: str, torch_dtype: torch.dtype, isa: str
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes.view(torch_dtype).float().isfinite()]
    spec = random_weight(fmt, len(codes), 1).spec
    weight = PackedWeight.from_codes(spec, codes[:, None], torch.ones(len(codes), 1))

    found = product(weight, torch.ones(1, 1), None, isa)

    assert torch.equal(found[0], codes.view(torch_dtype).float())


def test_the_dtype_of_activations_is_kept_and_threads_change_nothing() -> None:
    weight, x = random_weight("fp8_e4m3", 40, 64), numbers(3, 64)
    assert product(weight, x.bfloat16()).dtype == torch.bfloat16
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = product(weight, x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many, product(weight, x))


def test_what_it_cannot_read_is_refused() -> None:
    odd = random_weight("nf4", 4, 10, **group(5))
    reason = NativeFloats().refuses(Case(odd.spec, "cpu", torch.float32, None, 1))
    assert reason is not None
    assert "middle of a byte" in reason
    integers = random_weight("int4", 4, 8)
    reason = NativeFloats().refuses(Case(integers.spec, "cpu", torch.float32, None, 1))
    assert reason == "int4 is no fp8 and no nf4"


FOUR_BITS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 group 64": ("int4", group(64)),
    "uint4 group 64": ("uint4", group(64)),
    "uint4 group 32, float32": ("uint4", group(32, scale_dtype="float32")),
    "uint4 group 16": ("uint4", group(16)),
    "uint4 group 50": ("uint4", group(50)),
    "uint4 channel": ("uint4", {}),
    "int4 tensor": ("int4", {"granularity": "tensor"}),
    "int4 block": ("int4", {"granularity": "block", "block_size": (16, 64)}),
    "mxfp4": ("fp4_e2m1", group(32, **E8M0)),
    "nvfp4": ("fp4_e2m1", group(16, **E4M3)),
    "nf4": ("nf4", group(64)),
}


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOUR_BITS.values(), ids=FOUR_BITS)
def test_four_bits_are_unpacked_to_what_they_stand_for(
    kind: tuple[str, dict[str, Any]], dtype: torch.dtype, isa: str
) -> None:
    for n, k in ((33, 320), (5, 74), (1, 2)):
        weight = random_weight(kind[0], n, k, **kind[1])
        prepared = NativeBfloat16().prepare(weight)
        found = torch.full((n, k), torch.nan, dtype=dtype)
        prepared.kernels.float_unpack(
            prepared.address, found.data_ptr(), DTYPES[dtype], 0, n, ISAS.index(isa), 1
        )

        expected = weight.dequantize()
        allowed = 1e-6 if dtype == torch.float32 else 2.0**-8
        assert ((found.double() - expected).abs() <= allowed * expected.abs()).all()


@pytest.mark.parametrize("kind", FOUR_BITS.values(), ids=FOUR_BITS)
def test_a_product_of_what_was_unpacked(kind: tuple[str, dict[str, Any]]) -> None:
    weight = random_weight(kind[0], 40, 2000, **kind[1])
    x, bias = numbers(2, 150, 2000), numbers(40, seed=2)
    backend = NativeBfloat16()

    found = backend.linear(x, backend.prepare(weight), bias, None, None)

    expected = F.linear(x.double(), weight.dequantize().double(), bias.double())
    assert found.shape == (2, 150, 40)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= backend.accuracy * expected.norm()


@pytest.mark.parametrize(
    ("fmt", "fields", "act", "rows", "reason"),
    [
        ("int8", {}, None, 512, "codes have 4 bits"),
        ("uint4", group(5), None, 512, "middle of a byte"),
        ("int4", group(128), None, 512, "groups of 128 are multiplied faster in int8"),
        ("uint4", group(64), "int8_token", 512, "int8 activations"),
        ("uint4", group(64), None, 256, "more than 256 rows"),
        ("uint4", group(128), None, 257, None),
        ("int4", group(64), None, 512, None),
    ],
)
def test_what_is_not_faster_in_bfloat16_is_left_to_others(
    fmt: str,
    fields: dict[str, Any],
    act: str | None,
    rows: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = random_weight(fmt, 4, 20 if fields == group(5) else 256, **fields).spec
    case = Case(spec, "cpu", torch.float32, act, rows)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr("modewright.runtime.backends.native_floats.fast_bfloat16", lambda: True)
    found = NativeBfloat16().refuses(case)

    assert found is None if reason is None else reason in str(found)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert NativeBfloat16().refuses(case) is not None
