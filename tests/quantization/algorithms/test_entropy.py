# SPDX-License-Identifier: Apache-2.0
"""Ranges searched for in a histogram: against loops, closed forms and the values themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.calibration.histogram import HistogramObserver
from modewright.errors import ConfigError, DataError
from modewright.formats.affine import fake_quantize
from modewright.formats.catalogue import NumberFormat, format_named
from modewright.formats.integer import IntegerFormat
from modewright.formats.scaling import scale_from_range
from modewright.quantization.algorithms.entropy import (
    divergence,
    entropy_range,
    mse_range,
    told_apart,
)

Range = tuple[torch.Tensor, torch.Tensor]
NAMES = ["int2", "int4", "int8", "uint4", "uint8", "fp8_e4m3", "fp4_e2m1"]
both = pytest.mark.parametrize("search", [entropy_range, mse_range], ids=["entropy", "mse"])


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def histogram(data: torch.Tensor, bins: int = 8192) -> HistogramObserver:
    observer = HistogramObserver(bins)
    observer.update(data)
    return observer


def error(data: torch.Tensor, ends: Range, fmt: NumberFormat) -> float:
    scale, points = scale_from_range(ends[0].reshape(1, 1), ends[1].reshape(1, 1), fmt)
    remains = fake_quantize(data.reshape(1, 1, -1), scale, points, fmt).flatten()
    return (remains - data).double().square().mean().item()


def slow_divergence(share: list[float], inside: list[bool], codes: list[int]) -> float:
    """The divergence of one threshold, one bin at a time, as the paper describes it."""
    kept = [place for place, is_kept in enumerate(inside) if is_kept]
    seen = {place: share[place] for place in kept}
    seen[kept[0]] += sum(share[: kept[0]])
    seen[kept[-1]] += sum(share[kept[-1] + 1 :])
    told = {}
    for place in kept:
        same = [other for other in kept if codes[other] == codes[place]]
        told[place] = sum(share[other] for other in same) / len(same)
    all_seen, all_told = sum(seen.values()), sum(told.values())
    return math.fsum(
        seen[p] / all_seen * math.log(seen[p] / all_seen * all_told / told[p]) for p in kept
    )


@given(
    shares=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    ends=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    data=st.data(),
)
def test_divergence_agrees_with_counting_bin_by_bin(
    shares: list[int], ends: tuple[int, int], data: st.DataObject
) -> None:
    count = len(shares)
    first, last = sorted(end % count for end in ends)
    inside = [first <= place <= last for place in range(count)]
    codes = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    share = torch.tensor(shares) / sum(shares)
    seen, told = told_apart(share, torch.tensor([inside]), torch.tensor([codes]))
    assert seen.sum().item() == pytest.approx(1.0)
    fast = divergence(seen, told).item()
    assert fast == pytest.approx(slow_divergence(share.tolist(), inside, codes), abs=1e-5)


def test_divergence_has_its_closed_form_and_is_zero_only_for_equals() -> None:
    one, other = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert divergence(one, other).item() == pytest.approx(math.log(2))
    assert divergence(one * 3, one).item() == pytest.approx(0.0, abs=1e-7)
    assert divergence(other, one).item() == math.inf


@pytest.mark.parametrize("name", NAMES)
def test_the_squared_error_is_about_the_least_that_any_threshold_has(name: str) -> None:
    fmt, data = format_named(name), normal(20_000) ** 3
    found = error(data, mse_range(histogram(data), fmt), fmt)
    low, high = data.min(), data.max()
    ends = [(torch.maximum(low, -t), torch.minimum(high, t)) for t in torch.logspace(-1, 2, 60)]
    assert found <= min(error(data, pair, fmt) for pair in ends) * 1.05


@pytest.mark.parametrize("name", NAMES)
def test_the_squared_error_is_never_above_that_of_the_whole_range(name: str) -> None:
    fmt = format_named(name)
    for data in (normal(5000), normal(5000).relu(), normal(5000).exp(), torch.linspace(-1, 3, 999)):
        observer = histogram(data)
        whole = observer.range
        assert whole is not None
        found = error(data, mse_range(observer, fmt), fmt)
        assert found <= error(data, whole, fmt) * 1.001 + 1e-12


def distortion(step: float, fmt: IntegerFormat) -> float:
    """The mean squared error of codes times ``step`` on a standard normal distribution, exactly."""

    def below(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    total = 0.0
    for code in range(fmt.qmin, fmt.qmax + 1):
        y = code * step
        a = y - step / 2 if code > fmt.qmin else -50.0
        b = y + step / 2 if code < fmt.qmax else 50.0
        total += (1 + y * y) * (below(b) - below(a)) - 2 * y * (density(a) - density(b))
        total += a * density(a) - b * density(b)
    return total


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_on_a_normal_distribution_it_is_the_best_uniform_quantizer(bits: int) -> None:
    data, fmt = normal(200_000), IntegerFormat(bits, signed=True)
    tops = [1 + place / 50 for place in range(200)]
    optimum = min(distortion(top / fmt.qmax, fmt) for top in tops)
    found = error(data, mse_range(histogram(data), fmt), fmt)
    assert found == pytest.approx(optimum, rel=0.03)


@both
def test_one_outlier_of_many_values_is_cut_off(search: Callable[..., Range]) -> None:
    data = torch.cat([normal(100_000), torch.tensor([60.0])])
    low, high = search(histogram(data), format_named("int4"))
    assert -6 < low < -1.5
    assert 1.5 < high < 30
    assert error(data, (low, high), format_named("int4")) < 0.2 * error(
        data, (data.min(), data.max()), format_named("int4")
    )


@both
def test_what_the_format_holds_exactly_is_not_cut(search: Callable[..., Range]) -> None:
    # Codes stand for single bins: cutting loses values and gains nothing.
    data = torch.arange(-7.0, 8.0).repeat_interleave(torch.arange(1, 16)) + 2**-12
    low, high = search(histogram(data, bins=2**16), format_named("int4"))
    assert high == data.max()
    assert low <= -6.9


def test_a_peak_of_zeros_does_not_matter_to_entropy() -> None:
    fmt, data = format_named("uint8"), normal(50_000).abs()
    alone = entropy_range(histogram(data), fmt)[1]
    with_peak = entropy_range(histogram(torch.cat([data, torch.zeros(50_000)])), fmt)[1]
    assert with_peak.item() == pytest.approx(alone.item(), rel=0.15)


@both
@pytest.mark.parametrize("name", NAMES)
def test_the_range_lies_within_what_was_seen(search: Callable[..., Range], name: str) -> None:
    data = normal(2000) * 0.1 + 1.0
    low, high = search(histogram(data), format_named(name))
    assert low == data.min()  # the longer end is cut first
    assert low < high <= data.max()


@both
@pytest.mark.parametrize("value", [0.0, 2.5, -1e-30, 3e38], ids=str)
def test_a_single_value_is_its_own_range(search: Callable[..., Range], value: float) -> None:
    data = torch.full((7,), value)
    low, high = search(histogram(data), format_named("int8"))
    assert low == high == value


@both
def test_weights_of_another_magnitude_have_the_same_range_times_that(
    search: Callable[..., Range],
) -> None:
    data = normal(3000)
    one, other = (search(histogram(data * f), format_named("int8")) for f in (1.0, 2.0**-20))
    assert torch.allclose(torch.stack(one) * 2.0**-20, torch.stack(other))


@both
def test_one_step_is_the_whole_range(search: Callable[..., Range]) -> None:
    observer = histogram(normal(100))
    assert search(observer, format_named("int4"), steps=1) == observer.range


@both
def test_nothing_seen_and_no_steps_are_errors(search: Callable[..., Range]) -> None:
    with pytest.raises(DataError, match="no range"):
        search(HistogramObserver(), format_named("int8"))
    with pytest.raises(ConfigError, match="received 0"):
        search(histogram(normal(5)), format_named("int8"), steps=0)
