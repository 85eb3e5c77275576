# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: where it starts, what it learns, and that gradients pass."""

from __future__ import annotations

import pytest
import torch

from modewright.formats.affine import dequantize, quantize
from modewright.formats.catalogue import format_named, round_to
from modewright.formats.grouping import Grouping
from modewright.formats.scaling import ScaleFormat, global_scale_of
from modewright.quantization.algorithms import learned_rounding
from modewright.quantization.algorithms.learned_rounding import (
    LearnedWeight,
    Schedule,
    learn,
    local_step,
)
from modewright.quantization.algorithms.max import max_scale

CASES: list[tuple[str, ScaleFormat]] = [
    ("int4", "fp32"),
    ("uint4", "fp32"),
    ("uint2", "fp32"),
    ("int8", "fp32"),
    ("fp8_e4m3", "fp32"),
    ("nf4", "fp32"),
    ("fp4_e2m1", "e8m0"),
    ("fp4_e2m1", "e4m3"),
]


def make(name: str, kind: ScaleFormat, codes: torch.Tensor | None = None) -> LearnedWeight:
    fmt = format_named(name)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    grouped = Grouping("group", 16).split(weight)
    level = global_scale_of(weight.abs().amax(), fmt) if kind == "e4m3" else None
    scale, zero_point = max_scale(grouped, fmt, kind, level)
    return LearnedWeight(
        grouped, scale, zero_point, fmt, scale_format=kind, global_scale=level, codes=codes
    )


def rounded(weight: LearnedWeight) -> torch.Tensor:
    scale, zero_point = weight.scale()
    codes = quantize(weight.grouped, scale.detach(), zero_point, weight.format)
    return dequantize(codes, scale.detach(), zero_point)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_starts_with_the_nearest_codes(name: str, kind: ScaleFormat) -> None:
    weight = make(name, kind)

    assert torch.equal(weight.values().detach(), rounded(weight))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_starts_with_codes_that_were_chosen(name: str, kind: ScaleFormat) -> None:
    plain = make(name, kind)
    other = make(name, kind)
    with torch.no_grad():
        other.offset.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    chosen = other.codes()[0].detach()
    weight = make(name, kind, codes=chosen)

    assert not torch.equal(chosen, plain.codes()[0])
    assert torch.equal(weight.codes()[0].detach(), chosen)


@pytest.mark.parametrize("optimizer", ["sign", "adam"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_learns_what_the_layer_puts_out(name: str, kind: ScaleFormat, optimizer: str) -> None:
    weight = make(name, kind)
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(8, 32, generator=generator)
    rows = torch.randn(64, 8, generator=generator) @ mix
    rows = rows + 0.5 * torch.randn(64, 32, generator=generator)
    join = Grouping("group", 16).join
    shape = torch.Size((8, 32))
    wanted = rows @ join(weight.grouped, shape).t()

    def loss(step: int = 0) -> torch.Tensor:
        return (rows @ join(weight.values(), shape).t() - wanted).square().mean()

    before = float(loss().detach())
    history = learn(
        [weight],
        loss,
        Schedule(200, 0.005, 0.005, "sign" if optimizer == "sign" else "adam"),
    )

    assert history[0] == pytest.approx(before)
    assert (float(loss().detach()) if optimizer == "adam" else min(history)) < 0.98 * before


def test_offsets_and_factors_stay_in_range() -> None:
    weight = make("int4", "fp32")
    learn([weight], lambda step: weight.values().sum() * 1e3, Schedule(20, 0.3, 0.3))

    assert weight.offset.abs().max() <= 0.5
    assert weight.factor.min() >= 0.3


def test_parameters_that_do_not_matter_stay() -> None:
    used, unused = make("int4", "fp32"), make("int4", "fp32")
    learn([used, unused], lambda step: used.values().square().sum(), Schedule(5, 0.05, 0.05))

    assert unused.offset.abs().max() == 0
    assert used.offset.abs().max() > 0


@pytest.mark.parametrize("kind", ["e8m0", "e4m3"])
def test_learned_scales_are_numbers_of_their_format(kind: ScaleFormat) -> None:
    weight = make("fp4_e2m1", kind)
    with torch.no_grad():
        weight.factor.uniform_(0.5, 1.0, generator=torch.Generator().manual_seed(4))
    scale = weight.scale()[0].detach()
    fractions = torch.frexp(scale).mantissa if kind == "e8m0" else None
    if fractions is not None:
        assert set(fractions.unique().tolist()) == {0.5}
    else:
        values = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        level = global_scale_of(values.abs().amax(), weight.format)
        stored = scale / level
        assert torch.allclose(stored.to(torch.float8_e4m3fn).float(), stored, rtol=1e-6)


def readable_values(weight: LearnedWeight) -> torch.Tensor:
    """The same value from operations that autograd knows; rounding passes gradients through."""

    def straight(exact: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return exact + (value - exact).detach()

    scale, zero_point = weight.scale()
    fmt = weight.format
    place = weight.grouped / scale.unsqueeze(-1)
    place = place + weight.offset * local_step(place.detach(), fmt)
    if zero_point is not None:
        place = straight(place, place.detach().round()) + zero_point.unsqueeze(-1)
    margin = 0.5 if fmt.name.lstrip("u").startswith("int") else 0.0
    ends = place.clamp(fmt.min_value - margin, fmt.max_value + margin)
    codes = straight(ends, round_to(place.detach(), fmt))
    if zero_point is not None:
        codes = codes - zero_point.unsqueeze(-1)
    return codes * scale.unsqueeze(-1)


@pytest.mark.parametrize("slab", [1, 48, 1 << 16])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_are_those_of_the_readable_formula(
    name: str, kind: ScaleFormat, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_rounding, "_SLAB", slab)
    weight = make(name, kind)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight.offset.uniform_(-0.5, 0.5, generator=generator)
        weight.factor.uniform_(0.4, 1.0, generator=generator)  # so that some values saturate
    towards = torch.randn(weight.grouped.shape, generator=generator)

    found, expected = weight.values(), readable_values(weight)
    by_rule = torch.autograd.grad((found * towards).sum(), weight.parameters)
    by_autograd = torch.autograd.grad((expected * towards).sum(), weight.parameters)

    assert torch.allclose(found, expected, atol=1e-6)
    for ours, theirs in zip(by_rule, by_autograd, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.abs().max() > 0
