# SPDX-License-Identifier: Apache-2.0
"""Scales of least squared error: never worse than max scales, and close to trying everything."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize, quantize
from modewright.formats.catalogue import FORMATS, NumberFormat, code_values, format_named
from modewright.formats.floating import FP8_E4M3
from modewright.formats.scaling import global_scale_of, scale_from_range
from modewright.quantization.algorithms.max import max_scale
from modewright.quantization.algorithms.mse import mse_scale

every_format = pytest.mark.parametrize("fmt", [pytest.param(f, id=n) for n, f in FORMATS.items()])
SIGNED = [pytest.param(f, id=n) for n, f in FORMATS.items() if f.signed]
UNSIGNED = [pytest.param(f, id=n) for n, f in FORMATS.items() if not f.signed]
Scales = tuple[torch.Tensor, torch.Tensor | None]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(
    grouped: torch.Tensor, scales: Scales, fmt: NumberFormat, importance: torch.Tensor | None = None
) -> torch.Tensor:
    remains = dequantize(quantize(grouped, *scales, fmt), *scales)
    squares = (remains.double() - grouped.double()).square()
    return (squares if importance is None else squares * importance.double()).sum(-1)


def slow_error(values: list[float], scale: float, fmt: NumberFormat, weights: list[float]) -> float:
    """The objective for one group of a signed format, one value at a time."""
    numbers = [number for number in code_values(fmt) if not math.isnan(number)]
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        nearest = min(abs(number * scale - value) for number in numbers)
        total += weight * nearest**2
    return total


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "fp4_e2m1", "nf4"])
def test_it_is_as_good_as_trying_every_scale_one_value_at_a_time(name: str) -> None:
    fmt = format_named(name)
    grouped = normal(1, 4, 1, 24) * 0.02
    weights = torch.rand(24, generator=torch.Generator().manual_seed(2))
    found, _ = mse_scale(grouped, fmt, importance=weights)
    ours = reference = 0.0
    for row, scale in zip(grouped.flatten(1).tolist(), found.flatten().tolist(), strict=True):
        top = max(map(abs, row)) / fmt.max_value
        scales = [top * step / 60 for step in range(6, 126)]
        reference += min(slow_error(row, s, fmt, weights.tolist()) for s in scales)
        ours += slow_error(row, scale, fmt, weights.tolist())
    assert ours <= reference * 1.02


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("scale_format", ["fp32", "e8m0", "e4m3"])
@every_format
def test_it_is_never_worse_than_max_scales(
    fmt: NumberFormat, scale_format: str, weighted: bool
) -> None:
    tails = normal(3, 12, 3, 40) * normal(4, 12, 3, 40).abs() ** 3 + 0.2
    weights = normal(5, 3, 40).abs() ** 2 if weighted else None
    level = global_scale_of(tails.abs().amax(), fmt) if scale_format == "e4m3" else None
    found = mse_scale(tails, fmt, scale_format, level, importance=weights)  # type: ignore[arg-type]
    start = max_scale(tails, fmt, scale_format, level)  # type: ignore[arg-type]
    ours, theirs = error(tails, found, fmt, weights), error(tails, start, fmt, weights)
    assert (ours <= theirs * (1 + 1e-5)).all()
    if scale_format == "fp32":  # for int8 no neighbouring power of two need be better
        assert ours.sum() < theirs.sum()


@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=10),
    fmt=st.sampled_from(list(FORMATS.values())),
)
def test_it_is_never_worse_than_max_scales_on_any_values(
    values: list[float], fmt: NumberFormat
) -> None:
    grouped = torch.tensor(values).reshape(1, 1, -1)
    found = error(grouped, mse_scale(grouped, fmt), fmt)
    allowed = error(grouped, max_scale(grouped, fmt), fmt) * (1 + 1e-4) + 1e-30
    assert (found <= allowed + grouped.double().square().sum() * 1e-12).all()


@pytest.mark.parametrize("name", ["int4", "int8", "fp4_e2m1", "fp8_e4m3"])
def test_no_scale_below_the_bound_is_better_than_the_max_scale(name: str) -> None:
    fmt = format_named(name)
    for seed in range(5):
        grouped = normal(seed, 1, 1, 32)
        largest, worst = grouped.abs().max(), error(grouped, max_scale(grouped, fmt), fmt)
        bound = (largest - worst.sqrt()) / max(fmt.max_value, -fmt.min_value)
        for part in torch.linspace(0.05, 0.999, 40):
            assert error(grouped, ((bound * part).float().reshape(1, 1), None), fmt) >= worst


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_extra_negative_code_is_used(bits: int) -> None:
    fmt = format_named(f"int{bits}")
    codes = torch.tensor([fmt.min_value, 0.0, 1.0, -1.0, fmt.max_value]).reshape(1, 1, -1)
    grouped = codes * 0.25
    assert error(grouped, mse_scale(grouped, fmt), fmt) < 1e-10
    assert error(grouped, max_scale(grouped, fmt), fmt) > 1e-6


@pytest.mark.parametrize(("bits", "optimum"), [(3, 0.03744), (4, 0.01154), (5, 0.003495)])
def test_on_a_normal_distribution_it_comes_near_the_best_uniform_quantizer(
    bits: int, optimum: float
) -> None:
    # Max 1960, "Quantizing for minimum distortion", table II. His levels lie symmetrically around
    # zero, which codes of integers cannot, so a little more is lost.
    grouped = normal(6, 1, 1, 200_000)
    for name in (f"int{bits}", f"uint{bits}"):
        fmt = format_named(name)
        mean = (error(grouped, mse_scale(grouped, fmt), fmt) / 200_000).item()
        assert optimum * 0.99 < mean < optimum * 1.1


@pytest.mark.parametrize("name", ["fp4_e2m1", "nf4", "fp8_e4m3", "int8"])
def test_powers_of_two_are_as_good_as_trying_them_all(name: str) -> None:
    fmt = format_named(name)
    grouped = normal(7, 20, 2, 32)
    found, _ = mse_scale(grouped, fmt, "e8m0")
    assert torch.equal(torch.frexp(found).mantissa, torch.full_like(found, 0.5))
    powers = [torch.full((20, 2), 2.0**power) for power in range(-12, 6)]
    best = torch.stack([error(grouped, (scale, None), fmt) for scale in powers]).amin(0)
    assert torch.allclose(error(grouped, (found, None), fmt), best)


@pytest.mark.parametrize("name", ["fp4_e2m1", "int4", "fp8_e4m3"])
def test_fp8_scales_are_as_good_as_trying_them_all(name: str) -> None:
    fmt = format_named(name)
    grouped = normal(8, 20, 2, 16)
    level = global_scale_of(grouped.abs().amax(), fmt)
    found, _ = mse_scale(grouped, fmt, "e4m3", level)
    numbers = [number for number in code_values(FP8_E4M3) if number > 0]
    scales = [torch.full((20, 2), number) * level for number in numbers]
    assert torch.isin(found, torch.stack(scales)).all()
    best = torch.stack([error(grouped, (scale, None), fmt) for scale in scales]).amin(0)
    assert error(grouped, (found, None), fmt).sum() <= best.sum() * 1.01


@pytest.mark.parametrize("tails", [1, 3], ids=["normal", "heavy"])
@pytest.mark.parametrize("name", ["uint2", "uint3", "uint4"])
def test_ranges_are_as_good_as_trying_all_pairs_of_ends(name: str, tails: int) -> None:
    fmt = format_named(name)
    grouped = (normal(9, 16, 2, 48) + 0.3) ** tails
    best = error(grouped, max_scale(grouped, fmt), fmt)
    parts = [part / 20 for part in range(4, 22)]
    for low in parts:
        for high in parts:
            ends = grouped.amin(-1) * low, grouped.amax(-1) * high
            best = torch.minimum(best, error(grouped, scale_from_range(*ends, fmt), fmt))
    assert error(grouped, mse_scale(grouped, fmt), fmt).sum() <= best.sum() * 1.015


@pytest.mark.parametrize("name", ["int3", "int4", "uint3", "uint4", "fp4_e2m1"])
def test_no_other_scale_is_better_for_the_codes_that_were_chosen(name: str) -> None:
    fmt, grouped = format_named(name), normal(17, 64, 2, 48) + 0.3
    weights = normal(18, 48).square()
    scale, points = mse_scale(grouped, fmt, importance=weights)
    codes = dequantize(quantize(grouped, scale, points, fmt), torch.ones_like(scale), points)
    fitted = (weights * codes * grouped).sum(-1) / (weights * codes * codes).sum(-1)
    ours = error(grouped, (scale, points), fmt, weights)
    better = torch.minimum(ours, error(grouped, (fitted, points), fmt, weights))
    assert ours.sum() <= better.sum() * 1.0005


@pytest.mark.parametrize("name", ["int4", "fp4_e2m1"])
def test_a_much_finer_grid_finds_hardly_more(name: str) -> None:
    fmt, grouped = format_named(name), normal(19, 100, 1, 300) * normal(20, 300).abs()
    fine = error(grouped, mse_scale(grouped, fmt, steps=100), fmt).sum()
    assert error(grouped, mse_scale(grouped, fmt), fmt).sum() <= fine * 1.004


@pytest.mark.parametrize("fmt", UNSIGNED)
def test_zero_points_are_codes(fmt: NumberFormat) -> None:
    _, points = mse_scale(normal(10, 8, 2, 20) + 1.0, fmt)
    assert points is not None
    assert torch.equal(points, points.round().clamp(fmt.min_value, fmt.max_value))


def test_errors_move_to_where_they_count_less() -> None:
    fmt = format_named("int4")
    grouped = normal(11, 64, 1, 32)
    weights = torch.ones(32)
    weights[:4] = 1000.0
    plain = error(grouped, mse_scale(grouped, fmt), fmt, weights).sum()
    weighted = error(grouped, mse_scale(grouped, fmt, importance=weights), fmt, weights).sum()
    assert weighted < plain * 0.7


@every_format
def test_weights_of_another_magnitude_have_the_same_scales_times_that(fmt: NumberFormat) -> None:
    grouped = normal(12, 6, 2, 32)
    scale, points = mse_scale(grouped, fmt)
    small, same = mse_scale(grouped * 2.0**-9, fmt)
    assert torch.equal(small, scale * 2.0**-9)
    assert (points is None and same is None) or torch.equal(points, same)  # type: ignore[arg-type]


def test_rows_do_not_depend_on_each_other() -> None:
    fmt, grouped = format_named("uint4"), normal(13, 700, 2, 256)
    weights = normal(14, 700, 2, 256).abs()
    scale, points = mse_scale(grouped, fmt, importance=weights)
    for row in (0, 255, 256, 699):
        alone = mse_scale(grouped[row : row + 1], fmt, importance=weights[row : row + 1])
        assert torch.equal(scale[row], alone[0][0])
        assert torch.equal(points[row], alone[1][0])  # type: ignore[index]


@every_format
def test_groups_without_information_get_their_max_scale(fmt: NumberFormat) -> None:
    grouped = torch.zeros(4, 1, 3)
    grouped[1, 0, 0], grouped[2, 0, 0] = math.nan, math.inf
    grouped[3] = torch.tensor([1.0, -2.0, 0.3])
    weights = torch.ones(4, 1, 3)
    weights[3] = 0.0
    found, expected = mse_scale(grouped, fmt, importance=weights), max_scale(grouped, fmt)
    assert torch.equal(found[0].nan_to_num(-1), expected[0].nan_to_num(-1))


@every_format
@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty_tensors_have_scale_one(fmt: NumberFormat, shape: tuple[int, ...]) -> None:
    scale, _ = mse_scale(torch.empty(shape), fmt)
    assert torch.equal(scale, torch.ones(shape[:2]))


def test_half_precision_is_searched_in_float32() -> None:
    grouped = normal(15, 4, 2, 32).bfloat16()
    scale, _ = mse_scale(grouped, format_named("int4"))
    assert torch.equal(scale, mse_scale(grouped.float(), format_named("int4"))[0])


@pytest.mark.parametrize("fmt", SIGNED)
def test_gradients_play_no_part(fmt: NumberFormat) -> None:
    scale, _ = mse_scale(normal(16, 2, 1, 8).requires_grad_(), fmt)
    assert not scale.requires_grad


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"shrink": 0.0}, {"shrink": 1.5}], ids=["steps", "none", "beyond"]
)
def test_a_grid_that_is_none_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="received steps="):
        mse_scale(torch.ones(1, 1, 2), format_named("int4"), **options)  # type: ignore[arg-type]
