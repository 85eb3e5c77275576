# SPDX-License-Identifier: Apache-2.0
"""Every backend keeps its stated accuracy wherever it does not refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modewright.errors import ConfigError
from modewright.runtime.backends import Case, backend_named, backends
from modewright.runtime.backends.buffered import Buffered, unpack_into
from modewright.runtime.backends.int_mm import IntMm
from modewright.runtime.backends.portable import portable_linear
from support.packed_weights import WEIGHTS, group, random_weight

SHAPES = ((64, 256), (48, 192), (33, 100), (16, 40))


@pytest.mark.parametrize("name", [n for n in backends() if n not in ("int-mm", "fp8-mm")])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_error_is_within_the_stated_accuracy(name: str, weight: tuple[str, dict[str, Any]]) -> None:
    backend = backend_named(name)
    for n, k in SHAPES:
        packed = random_weight(weight[0], n, k, **weight[1])
        for act in (None, "int8_token", "int8_tensor", "fp8_token", "fp8_tensor"):
            for rows in (1, 2, 20, *([150] if name == "native-tiles" else [])):
                for dtype in (torch.float32, torch.bfloat16):
                    if backend.refuses(Case(packed.spec, "cpu", dtype, act, rows)) is None:
                        check(name, packed, rows, act, dtype)


def check(name: str, packed: Any, rows: int, act: str | None, dtype: torch.dtype) -> None:
    backend = backend_named(name)
    made = torch.Generator().manual_seed(1)
    x = torch.randn(rows, packed.spec.shape[1], generator=made).to(dtype)
    bias = torch.randn(packed.spec.shape[0], generator=made).to(dtype)
    scale = torch.tensor([[0.03]]) if str(act).endswith("tensor") else None

    y = backend.linear(x, backend.prepare(packed), bias, act, scale)

    exact = portable_linear(x.float(), packed, bias.float(), act, scale)
    assert y.dtype == dtype
    allowed = backend.accuracy + (0 if dtype is torch.float32 else 6e-3)
    assert (y.float() - exact).norm() <= allowed * exact.norm(), packed.spec


def test_each_backend_says_what_it_is() -> None:
    for name, backend in backends().items():
        assert backend.name == name
        assert len(backend.summary) > 20
        assert backend.needs
        assert 0 < backend.accuracy < 0.1


def test_an_unknown_backend_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'native'"):
        backend_named("natve")


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_tables_of_bytes_give_what_dequantizing_gives(weight: tuple[str, dict[str, Any]]) -> None:
    packed = random_weight(weight[0], 24, 256, **weight[1])
    backend = Buffered()
    if backend.refuses(Case(packed.spec, "cpu", torch.float32, None, 20)):
        pytest.skip("it refuses this weight")
    out = torch.empty(24, 256)

    unpack_into(out, backend.prepare(packed))

    assert torch.equal(out, packed.dequantize())


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("act", ["int8_token", "int8_tensor"])
def test_the_product_for_gpus_is_right_where_torch_runs_it_on_the_cpu(act: str, rows: int) -> None:
    packed = random_weight("int8", 24, 64)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([[0.03]]) if act == "int8_tensor" else None
    backend = IntMm()

    y = backend.linear(x, backend.prepare(packed), None, act, scale)

    torch.testing.assert_close(
        y, portable_linear(x, packed, None, act, scale), rtol=1e-4, atol=1e-3
    )
    assert "GPU" in str(backend.refuses(Case(packed.spec, "cpu", x.dtype, act, rows)))


@pytest.mark.parametrize("name", ["onednn-int8", "int-mm"])
def test_activations_that_are_not_finite_do_not_become_finite(name: str) -> None:
    packed, backend = random_weight("int8", 24, 64), backend_named(name)
    x = torch.ones(3, 64)
    x[1, 4] = torch.nan

    y = backend.linear(x, backend.prepare(packed), None, "int8_token", None)

    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_what_a_copy_takes_is_told() -> None:
    packed = random_weight("int4", 64, 256, **group(64))
    native, torch_one = backend_named("portable"), backend_named("int4pack")

    assert native.extra_bytes(native.prepare(packed)) == 0
    assert torch_one.extra_bytes(torch_one.prepare(packed)) >= 64 * 128
