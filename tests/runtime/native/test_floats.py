# SPDX-License-Identifier: Apache-2.0
"""The kernel for fp8 and nf4, under each instruction set, against exact arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from modewright.runtime.backends.base import Case
from modewright.runtime.backends.native_floats import NativeFloats
from modewright.runtime.packed_weight import PackedWeight
from support.kernel_library import each_isa, needs_library
from support.packed_weights import group, random_weight

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
