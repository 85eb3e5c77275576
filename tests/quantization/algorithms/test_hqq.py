# SPDX-License-Identifier: Apache-2.0
"""Half-quadratic quantization: against a slow copy of itself, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize, quantize
from modewright.formats.catalogue import FORMATS, NumberFormat, format_named
from modewright.formats.integer import IntegerFormat
from modewright.formats.scaling import global_scale_of
from modewright.quantization.algorithms.hqq import hqq_scale, shrink
from modewright.quantization.algorithms.max import max_scale

every_format = pytest.mark.parametrize("fmt", [pytest.param(f, id=n) for n, f in FORMATS.items()])
Scales = tuple[torch.Tensor, torch.Tensor | None]


def heavy_tails(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    return normal / torch.randn(*shape, generator=generator).abs().clamp_min(0.3)


def error(
    grouped: torch.Tensor, scales: Scales, fmt: NumberFormat, norm: float = 0.7
) -> torch.Tensor:
    remains = dequantize(quantize(grouped, *scales, fmt), *scales)
    return (remains.double() - grouped.double()).abs().pow(norm).sum(-1)


def slow_hqq(
    values: list[float], fmt: IntegerFormat, norm: float, beta: float, growth: float, rounds: int
) -> float:
    """Return the objective that HQQ reaches for one group of a signed format."""

    def codes_of(scale: float) -> list[int]:
        return [min(max(round(value / scale), fmt.qmin), fmt.qmax) for value in values]

    def cost(scale: float) -> float:
        pairs = zip(values, codes_of(scale), strict=True)
        return math.fsum(abs(code * scale - value) ** norm for value, code in pairs)

    scale = max(map(abs, values)) / fmt.qmax
    for _ in range(rounds):
        codes, target = codes_of(scale), []
        for value, code in zip(values, codes, strict=True):
            change = value / scale - code
            size = abs(change)
            kept = max(size - size ** (norm - 1) / beta, 0.0) if size else 0.0
            target.append(value - math.copysign(kept, change) * scale)
        product = math.fsum(c * t for c, t in zip(codes, target, strict=True))
        other = product / math.fsum(c * c for c in codes)
        if cost(other) < cost(scale):
            scale = other
        beta *= growth
    return cost(scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_it_reaches_what_its_slow_copy_reaches(bits: int, beta: float) -> None:
    fmt = IntegerFormat(bits, signed=True)
    grouped = heavy_tails(bits, 12, 1, 40)
    found = hqq_scale(grouped, fmt, beta=beta, growth=1.05)
    fast = error(grouped, found, fmt).flatten()
    slow = [slow_hqq(row, fmt, 0.7, beta, 1.05, 20) for row in grouped.flatten(1).tolist()]
    # A value close to the middle between two codes may fall to the other side in float32.
    near = torch.isclose(fast, torch.tensor(slow, dtype=torch.float64), rtol=1e-4)
    assert near.sum() >= 11
    assert fast.sum() == pytest.approx(sum(slow), rel=0.01)


@pytest.mark.parametrize("scale_format", ["fp32", "e8m0", "e4m3"])
@every_format
def test_it_is_never_worse_than_max_scales(fmt: NumberFormat, scale_format: str) -> None:
    grouped = heavy_tails(1, 12, 3, 40) + 0.2
    level = global_scale_of(grouped.abs().amax(), fmt) if scale_format == "e4m3" else None
    found = hqq_scale(grouped, fmt, scale_format, level)  # type: ignore[arg-type]
    start = max_scale(grouped, fmt, scale_format, level)  # type: ignore[arg-type]
    assert (error(grouped, found, fmt) <= error(grouped, start, fmt) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["int3", "int4", "uint3", "uint4", "fp4_e2m1"])
def test_it_is_better_than_max_scales_on_heavy_tails(name: str) -> None:
    fmt, grouped = format_named(name), heavy_tails(2, 64, 2, 64)
    found = error(grouped, hqq_scale(grouped, fmt), fmt).sum()
    assert found < error(grouped, max_scale(grouped, fmt), fmt).sum() * 0.99


def test_for_norm_one_shrinking_is_the_exact_proximal_step() -> None:
    places = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    for beta in (0.7, 2.0, 9.0):
        for change in (-2.0, -0.4, 0.0, 0.05, 1.3):
            costs = places.abs() + beta / 2 * (places - change).square()
            found = shrink(torch.tensor(change), 1.0, beta)
            assert found.item() == pytest.approx(places[costs.argmin()].item(), abs=1e-3)


def test_shrinking_leaves_large_errors_and_drops_small_ones() -> None:
    changes = torch.tensor([-100.0, -0.1, 0.0, 0.1, 100.0])
    result = shrink(changes, 0.5, 1.0)
    assert result.tolist() == pytest.approx([-99.9, 0.0, 0.0, 0.0, 99.9])


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_are_codes(bits: int) -> None:
    fmt = IntegerFormat(bits, signed=False)
    _, points = hqq_scale(heavy_tails(3, 20, 2, 24) + 1.0, fmt)
    assert points is not None
    assert torch.equal(points, points.round().clamp(fmt.qmin, fmt.qmax))


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_weights_of_another_magnitude_have_the_same_scales_times_that(name: str) -> None:
    # The objective is a sum of powers, so it is not exactly the same at ties.
    fmt, grouped = format_named(name), heavy_tails(4, 6, 2, 32)
    scale, _ = hqq_scale(grouped, fmt)
    assert torch.allclose(hqq_scale(grouped * 2.0**-9, fmt)[0], scale * 2.0**-9, rtol=1e-3)


@every_format
def test_groups_without_information_get_their_max_scale(fmt: NumberFormat) -> None:
    grouped = torch.zeros(3, 1, 3)
    grouped[1, 0, 0], grouped[2, 0, 0] = math.nan, math.inf
    found, expected = hqq_scale(grouped, fmt)[0], max_scale(grouped, fmt)[0]
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty_tensors_have_scale_one(shape: tuple[int, ...]) -> None:
    scale, points = hqq_scale(torch.empty(shape), format_named("uint4"))
    assert torch.equal(scale, torch.ones(shape[:2]))
    assert points is not None
    assert torch.equal(points, torch.zeros(shape[:2]))


@pytest.mark.parametrize("options", [{"norm": 0.0}, {"norm": 2.0}, {"beta": 0.0}], ids=str)
def test_a_norm_or_weight_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="received norm="):
        hqq_scale(torch.ones(1, 1, 2), format_named("int4"), **options)  # type: ignore[arg-type]
