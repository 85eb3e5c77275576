# SPDX-License-Identifier: Apache-2.0
"""GPTQ against its definition, against a slow reference and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modewright.formats.catalogue import NumberFormat, format_named, round_to
from modewright.least_squares import corrected_target, output_error
from modewright.quantization.algorithms.gptq import gptq

FORMATS = ["int2", "int4", "int8", "uint3", "uint4", "fp4_e2m1", "fp8_e4m3", "nf4"]


def inputs(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features // 2, features, generator=generator)
    noise = torch.randn(rows, features, generator=generator)
    return torch.randn(rows, features // 2, generator=generator) @ mix + noise


def problem(
    fmt: NumberFormat, out: int = 24, features: int = 40, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A weight, a Hessian, and scales that fit."""
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(out, features, generator=generator)
    rows = inputs(200, features, seed)
    scale = (weight.abs().amax(1, keepdim=True) / fmt.max_value).expand_as(weight)
    zero_point = None
    if not fmt.signed:
        scale, zero_point = scale * 2, torch.full_like(weight, float((fmt.max_value + 1) // 2))
    return weight, rows.t() @ rows, scale, zero_point


def values(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    return (codes if zero_point is None else codes - zero_point) * scale


def nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: NumberFormat
) -> torch.Tensor:
    shift = 0 if zero_point is None else zero_point
    codes = weight / scale if zero_point is None else (weight / scale).round() + shift
    return round_to(codes, fmt)


def reference(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    fmt: NumberFormat,
    damping: float,
) -> torch.Tensor:
    """Optimal brain quantization in the order of columns, by its definition: after each column the
    rest is the least-squares solution given what was rounded."""
    size = weight.shape[1]
    damped = hessian.double() + damping * hessian.diagonal().mean().double() * torch.eye(size)
    chosen = torch.zeros_like(weight)
    fixed = torch.zeros(weight.shape, dtype=torch.float64)
    for column in range(size):
        done, rest = slice(0, column), slice(column, size)
        error = weight[:, done].double() - fixed[:, done]
        move = torch.linalg.solve(damped[rest, rest], damped[rest, done] @ error.t()).t()
        target = (weight[:, rest].double() + move)[:, 0].float()
        zero = None if zero_point is None else zero_point[:, column]
        chosen[:, column] = nearest(target, scale[:, column], zero, fmt)
        fixed[:, column] = values(chosen[:, column], scale[:, column], zero).double()
    return chosen


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_what_solving_after_every_column_gives(name: str) -> None:
    fmt = format_named(name)
    weight, hessian, scale, zero_point = problem(fmt)
    fast = gptq(weight, hessian, scale, zero_point, fmt, activation_order=False)
    slow = reference(weight, hessian, scale, zero_point, fmt, damping=0.01)

    assert (fast == slow).float().mean() > 0.99  # a tie may fall either way


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_its_output_error_is_below_that_of_rounding_to_nearest(name: str, order: bool) -> None:
    fmt = format_named(name)
    weight, hessian, scale, zero_point = problem(fmt)
    chosen = gptq(weight, hessian, scale, zero_point, fmt, activation_order=order)
    rounded = nearest(weight, scale, zero_point, fmt)

    ours = output_error(weight, values(chosen, scale, zero_point), hessian).sum()
    theirs = output_error(weight, values(rounded, scale, zero_point), hessian).sum()
    assert ours < 0.9 * theirs


@given(seed=st.integers(0, 1000), block=st.sampled_from([1, 7, 16, 128]))
@settings(max_examples=20, deadline=None)
def test_blocks_change_nothing_but_the_time(seed: int, block: int) -> None:
    fmt = format_named("int4")
    weight, hessian, scale, zero_point = problem(fmt, out=4, features=33, seed=seed)
    one = gptq(weight, hessian, scale, zero_point, fmt, block=block)
    other = gptq(weight, hessian, scale, zero_point, fmt, block=33)

    assert (one == other).float().mean() > 0.97


def test_inputs_that_do_not_correlate_leave_nothing_to_gain() -> None:
    fmt = format_named("int4")
    weight, _, scale, _ = problem(fmt)
    chosen = gptq(weight, torch.diag(torch.rand(40) + 0.1), scale, None, fmt)

    assert torch.equal(chosen, nearest(weight, scale, None, fmt))


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    fmt = format_named("int4")
    weight, hessian, scale, _ = problem(fmt)
    hessian[:, 5] = hessian[5] = 0
    chosen = gptq(weight, hessian, scale, None, fmt)

    assert torch.equal(chosen[:, 5], nearest(weight, scale, None, fmt)[:, 5])


def test_codes_are_numbers_of_the_format() -> None:
    fmt = format_named("fp4_e2m1")
    weight, hessian, scale, _ = problem(fmt)
    chosen = gptq(weight, hessian, scale, None, fmt)

    assert set(chosen.abs().unique().tolist()) <= {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}


def test_neither_weight_nor_hessian_is_written_to() -> None:
    fmt = format_named("uint4")
    weight, hessian, scale, zero_point = problem(fmt)
    before = weight.clone(), hessian.clone(), scale.clone()
    gptq(weight, hessian, scale, zero_point, fmt)

    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, scale), strict=True))


def test_the_target_for_changed_inputs_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 10, generator=generator)
    original = inputs(300, 10)
    changed = original + 0.3 * torch.randn(300, 10, generator=generator)
    target = corrected_target(weight, changed.t() @ changed, original.t() @ changed, damping=1e-9)
    solution = torch.linalg.lstsq(changed.double(), (original @ weight.t()).double()).solution.t()

    assert torch.allclose(target.double(), solution, atol=1e-3)


def test_the_target_for_inputs_as_they_were_is_the_weight() -> None:
    weight, hessian, *_ = problem(format_named("int4"))

    assert torch.equal(corrected_target(weight, hessian, hessian.clone()), weight)


def test_strong_damping_holds_the_target_at_the_weight() -> None:
    weight = torch.randn(6, 10)
    rows = inputs(300, 10)
    cross = (rows + torch.randn(300, 10)).t() @ rows
    near = corrected_target(weight, rows.t() @ rows, cross, damping=1e6)

    assert torch.allclose(near, weight, atol=1e-3)


def test_the_output_error_is_that_of_the_outputs() -> None:
    rows = inputs(50, 10)
    weight, other = torch.randn(6, 10), torch.randn(6, 10)
    expected = (rows @ (weight - other).t()).square().sum(0)

    assert torch.allclose(output_error(weight, other, rows.t() @ rows), expected, rtol=1e-4)
