# SPDX-License-Identifier: Apache-2.0
"""The search of scales in the kernel library, under each instruction set, against tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modewright.formats.affine import quantize
from modewright.formats.catalogue import format_named
from modewright.formats.scaling import max_scale
from modewright.quantization.algorithms.mse import SHRINK, STEPS, highest_factor, mse_scale
from modewright.runtime.native.scales import search_scales
from support.kernel_library import each_isa, needs_library

pytestmark = needs_library
Scales = tuple[torch.Tensor, torch.Tensor | None]


def search(
    grouped: torch.Tensor, name: str, importance: torch.Tensor | None, isa: str | None = None
) -> Scales:
    fmt = format_named(name)
    found = search_scales(
        grouped,
        *max_scale(grouped, fmt),
        code_range=(fmt.min_value, fmt.max_value),
        highest=highest_factor(fmt) if fmt.signed else 1.0,
        importance=importance,
        steps=STEPS,
        shrink=SHRINK,
        isa=isa,
    )
    assert found is not None
    return found


def error(
    grouped: torch.Tensor, scales: Scales, name: str, importance: torch.Tensor | None
) -> torch.Tensor:
    scale, zero_point = scales
    codes = quantize(grouped, scale, zero_point, format_named(name)).double()
    if zero_point is not None:
        codes = codes - zero_point.unsqueeze(-1)
    squares = (codes * scale.unsqueeze(-1) - grouped).square()
    return (squares if importance is None else squares * importance).sum(-1)


@each_isa
@pytest.mark.parametrize("counted", ["alike", "by column", "by value"])
@pytest.mark.parametrize("name", ["uint2", "uint4", "uint8", "int3", "int4", "int8"])
@pytest.mark.parametrize("shape", [(5, 3, 64), (4, 1, 100), (3, 2, 7)])
def test_scales_are_as_good_as_those_that_tensors_find(
    shape: tuple[int, int, int], name: str, counted: str, isa: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    grouped = torch.randn(*shape, generator=generator) ** 3
    sizes = {"alike": None, "by column": shape[1:], "by value": shape}[counted]
    importance = None if sizes is None else torch.rand(*sizes, generator=generator) ** 2

    found = error(grouped, search(grouped, name, importance, isa), name, importance)

    by_tensors = mse_scale(grouped, format_named(name), importance=importance)
    assert (found <= error(grouped, by_tensors, name, importance) * 1.02 + 1e-12).all()
    total = error(grouped, by_tensors, name, importance).sum()
    assert found.sum() <= total * 1.002


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["uint3", "uint4", "int2", "int4"]),
    size=st.integers(1, 70),
    power=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15]),
)
@settings(deadline=None)
def test_scales_never_lose_to_max_scales(seed: int, name: str, size: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    grouped = torch.randn(3, 2, size, generator=generator) ** 3 * power

    found = error(grouped, search(grouped, name, None), name, None)

    before = error(grouped, max_scale(grouped, format_named(name)), name, None)
    assert (found <= before * (1 + 1e-5) + 1e-12 * power**2).all()


@each_isa
def test_zeros_and_what_is_not_finite_keep_their_max_scales(isa: str) -> None:
    grouped = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    grouped[0, 0], grouped[1, 0, 3], grouped[2, 1, 5] = 0.0, torch.nan, torch.inf
    for name in ("uint4", "int4"):
        before, points = max_scale(grouped, format_named(name))

        scale, zero_point = search(grouped, name, None, isa)

        for place in ((0, 0), (1, 0), (2, 1)):
            assert torch.equal(scale[place], before[place]) or scale[place].isnan()
            if zero_point is not None and points is not None:
                torch.testing.assert_close(zero_point[place], points[place], equal_nan=True)


def test_the_number_of_threads_changes_nothing() -> None:
    grouped = torch.randn(64, 4, 32, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = search(grouped, "uint4", None)
        torch.set_num_threads(3)
        three = search(grouped, "uint4", None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0])
    assert one[1] is not None
    assert three[1] is not None
    assert torch.equal(one[1], three[1])


def test_without_the_library_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEWRIGHT_NATIVE", "0")
    grouped = torch.randn(2, 2, 8)
    scale, _ = max_scale(grouped, format_named("int4"))
    fields = {"code_range": (-8.0, 7.0), "highest": 1.0, "importance": None}
    assert search_scales(grouped, scale, None, steps=6, shrink=0.1, **fields) is None  # type: ignore[arg-type]
