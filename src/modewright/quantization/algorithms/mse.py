# SPDX-License-Identifier: Apache-2.0
r"""Scales of least squared error: clip a little where that makes the rest finer.

A max scale clips nothing, so one outlier makes all steps of its group coarse. This search tries
other scales (and zero points) for every group and keeps the one with the least

    sum of importance * (value - what remains of it) ** 2

Importance, such as the mean squared input of a column, turns that into the error of the layer's
output as far as the diagonal of its Hessian knows it (the clipping of Lin et al. 2023, AWQ; the
Hessian of Frantar et al. 2022, GPTQ). The max scale is tried first and only a smaller error
replaces it, so the result is never worse in this objective.

Which scales are worth trying follows from the error ``E`` of the max scale. A value ``w`` that
saturates at ``t`` costs ``importance * (|w| - t) ** 2`` alone, so no range that ends below
``|w| - sqrt(E / importance)``, for any value, can be better. The grid is laid over what is left,
group by group. After it comes a closed form: the best scale for fixed codes ``c`` is
``<c, w> / <c, c>``, which may change codes, and so on (alternating least squares, as in the
quantizer of Lloyd 1982).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from modewright.errors import ConfigError
from modewright.formats.affine import quantize
from modewright.formats.catalogue import NumberFormat, code_values
from modewright.formats.floating import FloatFormat
from modewright.formats.scaling import ScaleFormat, max_scale, round_scale, scale_from_range

Scales = tuple[torch.Tensor, torch.Tensor | None]

STEPS = 6
"""Places that each end of a range is moved to."""
SHRINK = 0.1
"""The smallest part of the max range that is tried."""

_SLAB = 1 << 17  # values searched at a time: few enough for a processor's cache
_UPDATES = 2
_SHIFTS = (0, 1, -1, 0)  # of the zero point, when the scale is fitted to it
_POWERS_OF_TWO = (2.0, 0.5, 0.25, 0.125)


class BestScale:
    """The best scales found so far for every group; at first the max scales.

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        fmt: The format of the codes.
        scale_format: What scales are rounded to.
        global_scale: The tensor's scale, scalar; only for the scale format ``"e4m3"``.
        cost: Takes what quantization changed, ``[rows, groups, group]`` float32, which it may
            overwrite; returns what that costs each group, ``[rows, groups]``.

    Attributes:
        values: ``grouped`` in float32.
        scale: ``[rows, groups]`` float32.
        zero_point: The same shape, or ``None`` for a signed format.
        error: The cost under them. It only falls; where it is NaN nothing is better.
    """

    def __init__(
        self,
        grouped: torch.Tensor,
        fmt: NumberFormat,
        scale_format: ScaleFormat,
        global_scale: torch.Tensor | None,
        cost: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.values, self.fmt, self.cost = grouped.detach().float(), fmt, cost
        self.scale_format, self.global_scale = scale_format, global_scale
        self.scale, self.zero_point = max_scale(self.values, fmt, scale_format, global_scale)
        self.error = self._error(self.scale, self.zero_point)

    def offer(self, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> None:
        """Take other scales, rounded to what their format holds, in the groups they are better."""
        scale = round_scale(scale, self.scale_format, self.global_scale)
        error = self._error(scale, zero_point)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point = torch.where(better, zero_point, self.zero_point)

    def offer_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take the scales and zero points of other ranges in the groups they are better."""
        self.offer(*scale_from_range(low, high, self.fmt, self.scale_format, self.global_scale))

    def codes(self, zero_point: torch.Tensor | None) -> torch.Tensor:
        """Return the numbers that stand for the values under the best scale and a zero point.

        They are counted from the zero point: times the scale they are what remains.
        """
        codes = quantize(self.values, self.scale, zero_point, self.fmt)
        return codes if zero_point is None else codes.sub_(zero_point.unsqueeze(-1))

    def _error(self, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        codes = quantize(self.values, scale, zero_point, self.fmt)
        if zero_point is not None:
            codes.sub_(zero_point.unsqueeze(-1))
        return self.cost(codes.mul_(scale.unsqueeze(-1)).sub_(self.values))


def mse_scale(
    grouped: torch.Tensor,
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
    global_scale: torch.Tensor | None = None,
    *,
    importance: torch.Tensor | None = None,
    steps: int = STEPS,
    shrink: float = SHRINK,
) -> Scales:
    """Return for every group the scale and zero point with the least squared error found.

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        fmt: The format of the codes.
        scale_format: What scales are rounded to.
        global_scale: The tensor's scale, scalar; only for the scale format ``"e4m3"``.
        importance: What the squared error of every value counts, not negative, broadcastable to
            ``grouped``; ``None`` counts all alike.
        steps: Places that each end of a range is moved to.
        shrink: The smallest part of the max range that is tried.

    Returns:
        ``scale`` and ``zero_point`` (``None`` if the format is signed), ``[rows, groups]`` float32.
        Groups that hold a value that is not finite get their max scale, which is not finite.

    Raises:
        ConfigError: ``steps`` or ``shrink`` is out of range.
    """
    if steps < 1 or not 0 < shrink <= 1:
        raise ConfigError(
            f"expected steps >= 1 and 0 < shrink <= 1; received steps={steps}, shrink={shrink}."
        )
    if not grouped.numel():
        return max_scale(grouped, fmt, scale_format, global_scale)

    def search(rows: slice) -> BestScale:
        weights = None
        if importance is not None:
            weights = importance.detach().float().expand(grouped.shape)[rows]

        def squares(change: torch.Tensor) -> torch.Tensor:
            change = change.square_()
            return (change if weights is None else change.mul_(weights)).sum(dim=-1)

        best = BestScale(grouped[rows], fmt, scale_format, global_scale, squares)
        if not fmt.signed:
            _search_range(best, weights, steps, shrink)
        elif scale_format == "e8m0":
            base = best.scale
            for power in _POWERS_OF_TWO:
                best.offer(base * power)
        else:
            _search_symmetric(best, weights, steps, shrink)
        return best

    return by_slabs(grouped, search)


def by_slabs(grouped: torch.Tensor, search: Callable[[slice], BestScale]) -> Scales:
    """Return the scales of all rows, which ``search`` finds for some rows at a time."""
    rows = grouped.shape[0]
    height = max(1, _SLAB * rows // grouped.numel())
    found = [search(slice(top, top + height)) for top in range(0, rows, height)]
    points = [best.zero_point for best in found if best.zero_point is not None]
    return torch.cat([best.scale for best in found]), torch.cat(points) if points else None


def least_squares_scale(
    values: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the scale that is best for fixed codes, ``[rows, groups]``; NaN if all are zero."""
    weighted = codes if weights is None else codes * weights
    return (weighted * values).sum(dim=-1) / (weighted * codes).sum(dim=-1)


def _search_symmetric(
    best: BestScale, weights: torch.Tensor | None, steps: int, shrink: float
) -> None:
    """Try a coarse grid, a finer one around its best place, and then the closed form."""
    base, highest = best.scale, highest_factor(best.fmt)
    extent = max(best.fmt.max_value, -best.fmt.min_value) / best.fmt.max_value
    needed = (best.values.abs() - _tolerance(best, weights)).amax(dim=-1)
    needed = needed / (base * best.fmt.max_value * extent)
    lowest = needed.nan_to_num(shrink).clamp(shrink, 1.0)
    places = 2 * steps  # there is only one end to move
    width = (highest - lowest) / places
    best.offer(base / extent)  # the largest magnitude gets the extra negative code of integers
    for place in range(places):
        best.offer(base * (lowest + width * place))
    centre = best.scale
    for place in range(1, places + 1):
        best.offer(centre + base * width * (2 * place / (places + 1) - 1))
    for _ in range(_UPDATES):
        offer_fit(best, best.values, weights)


def _search_range(best: BestScale, weights: torch.Tensor | None, steps: int, shrink: float) -> None:
    """Move both ends inwards together, then each alone, then fit the scale to zero points."""
    tolerance = _tolerance(best, weights)
    low, high = best.values.amin(dim=-1).clamp_(max=0), best.values.amax(dim=-1).clamp_(min=0)
    low_part = ((best.values + tolerance).amin(dim=-1) / low).nan_to_num(1.0).clamp(shrink, 1.0)
    high_part = ((best.values - tolerance).amax(dim=-1) / high).nan_to_num(1.0).clamp(shrink, 1.0)
    places = [place / steps for place in range(steps)]
    lows = [low * torch.lerp(low_part, torch.ones_like(low), place) for place in places]
    highs = [high * torch.lerp(high_part, torch.ones_like(high), place) for place in places]
    for lower, upper in zip(lows, highs, strict=True):
        best.offer_range(lower, upper)
    lower, _ = _ends(best)
    for upper in highs:
        best.offer_range(lower, upper)
    _, upper = _ends(best)
    for lower in lows:
        best.offer_range(lower, upper)
    for shift in _SHIFTS:
        offer_fit(best, best.values, weights, shift)


def offer_fit(
    best: BestScale, target: torch.Tensor, weights: torch.Tensor | None = None, shift: int = 0
) -> None:
    """Offer the scale that brings the codes closest to a target, at a zero point nearby."""
    zero_point = best.zero_point
    if zero_point is not None:
        zero_point = (zero_point + shift).clamp(best.fmt.min_value, best.fmt.max_value)
    best.offer(least_squares_scale(target, best.codes(zero_point), weights), zero_point)


def _tolerance(best: BestScale, weights: torch.Tensor | None) -> torch.Tensor:
    """Return by how much each value may change before it alone costs more than all do now."""
    error = best.error.unsqueeze(-1)
    return error.sqrt() if weights is None else (error / weights).sqrt()


def highest_factor(fmt: NumberFormat) -> float:
    """Return the multiple of the max scale beyond which nothing new is gained.

    Integers and tables: there the largest code begins to lie idle. Floating-point numbers: their
    spacing under twice a scale is that under the scale itself, one exponent lower.
    """
    if isinstance(fmt, FloatFormat):
        return 2.0
    second, largest = sorted(code_values(fmt))[-2:]
    return largest / second if second > 0 else 2.0


def _ends(best: BestScale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest value that the best scales can hold."""
    zero_point = 0.0 if best.zero_point is None else best.zero_point
    low, high = best.fmt.min_value - zero_point, best.fmt.max_value - zero_point
    return low * best.scale, high * best.scale
