# SPDX-License-Identifier: Apache-2.0
"""Every backend that serves on a GPU keeps its stated accuracy there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modewright.runtime.backends import Case, backend_named, backends, choose, linear
from modewright.runtime.backends.portable import portable_linear
from modewright.runtime.packed_weight import PackedWeight
from support.packed_weights import WEIGHTS, random_weight

SHAPES = ((64, 256), (48, 192), (33, 100), (16, 40), (256, 1024))
ROWS = (1, 2, 7, 20, 100, 700)
LOST = {torch.float32: 0.0, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("name", backends())
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_error_is_within_the_stated_accuracy(name: str, weight: tuple[str, dict[str, Any]]) -> None:
    backend = backend_named(name)
    for shape in SHAPES:
        packed = random_weight(weight[0], *shape, **weight[1]).map(torch.Tensor.cuda)
        for act in (None, "int8_token", "int8_tensor", "fp8_token", "fp8_tensor"):
            for rows in ROWS:
                for dtype in LOST:
                    if backend.refuses(Case(packed.spec, "cuda", dtype, act, rows)) is None:
                        check(name, packed, rows, act, dtype)


def check(name: str, packed: PackedWeight, rows: int, act: str | None, dtype: torch.dtype) -> None:
    backend = backend_named(name)
    made = torch.Generator().manual_seed(1)
    x = torch.randn(rows, packed.spec.shape[1], generator=made).to("cuda", dtype)
    x *= 0.01 if dtype is torch.float16 else 1.0  # weights in fp8_e5m2 are large
    bias = torch.randn(packed.spec.shape[0], generator=made).to("cuda", dtype)
    scale = torch.tensor([[0.03]], device="cuda") if str(act).endswith("tensor") else None

    y = backend.linear(x, backend.prepare(packed), bias, act, scale)

    exact = portable_linear(x.double(), packed, bias.double(), act, scale)
    assert y.dtype == dtype
    allowed = backend.accuracy + LOST[dtype]
    assert (y.double() - exact).norm() <= allowed * exact.norm(), (packed.spec, rows, act, dtype)


def test_own_kernels_serve_where_nothing_else_does() -> None:
    spec = random_weight("int4", 64, 256, granularity="group", group_size=64).spec
    for rows in ROWS:
        case = Case(spec, "cuda", torch.bfloat16, None, rows)
        assert choose(case).name == "triton"


def test_a_compiled_product_is_that_of_the_kernels() -> None:
    weight = random_weight("int4", 64, 256, granularity="group", group_size=64)
    weight = weight.map(torch.Tensor.cuda)
    fast = torch.compile(lambda x: linear(weight, x, None), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for rows in (1, 100):
            x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(fast(x), linear(weight, x, None))
