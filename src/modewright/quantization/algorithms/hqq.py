# SPDX-License-Identifier: Apache-2.0
r"""Half-quadratic quantization (HQQ): scales that follow the many values, not the outliers.

No data is needed. The error is measured by ``sum |w - what remains of w| ** p`` with ``p < 1``,
which counts many small errors and cares little how far an outlier is off. That is hard to
minimise directly, so the error is split (Badri & Shaji 2023, "Half-Quadratic Quantization of
Large Machine Learning Models"): an auxiliary ``e`` takes the large part of it, and two easy
problems alternate, under a weight ``beta`` that grows:

1. ``e`` = the error, shrunk towards zero by ``|error| ** (p - 1) / beta`` (the proximal step);
2. scale and zero point = those whose codes come closest to ``w - e`` in least squares.

Two things differ from the paper. Zero points are integers, so the scale is fitted too, and zero
points one step away are tried. Errors are measured in steps of the scale, so that ``beta`` means
the same for weights of any magnitude.

The max scales are tried first and only a smaller error replaces them, so the result is never worse
in this objective. The search stays near them on purpose: far away the objective has smaller minima
that sacrifice so many large values that the squared error grows severalfold.
"""

from __future__ import annotations

import torch

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize
from modewright.formats.catalogue import NumberFormat
from modewright.formats.scaling import ScaleFormat, max_scale
from modewright.quantization.algorithms.mse import BestScale, Scales, by_slabs, offer_fit


def hqq_scale(
    grouped: torch.Tensor,
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
    global_scale: torch.Tensor | None = None,
    *,
    norm: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
) -> Scales:
    """Return for every group the scale and zero point with the least p-norm error found.

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        fmt: The format of the codes.
        scale_format: What scales are rounded to.
        global_scale: The tensor's scale, scalar; only for the scale format ``"e4m3"``.
        norm: The exponent ``p``: above 0, at most 1.
        beta: How closely the auxiliary error has to follow the error, at first; errors count in
            steps of the scale.
        growth: What ``beta`` is multiplied with after every iteration.
        iterations: How often the two problems alternate.

    Returns:
        ``scale`` and ``zero_point`` (``None`` if the format is signed), ``[rows, groups]`` float32.
        Groups that hold a value that is not finite get their max scale, which is not finite.

    Raises:
        ConfigError: ``norm`` or ``beta`` is out of range.
    """
    if not 0 < norm <= 1 or beta <= 0:
        raise ConfigError(
            f"expected 0 < norm <= 1 and beta > 0; received norm={norm}, beta={beta}."
        )
    if not grouped.numel():
        return max_scale(grouped, fmt, scale_format, global_scale)

    def search(rows: slice) -> BestScale:
        best = BestScale(
            grouped[rows],
            fmt,
            scale_format,
            global_scale,
            lambda change: change.abs_().pow_(norm).sum(dim=-1),
        )
        weight = beta
        for _ in range(iterations):
            target = best.values - _large_part(best, norm, weight)
            for shift in (0,) if best.zero_point is None else (0, 1, -1):
                offer_fit(best, target, shift=shift)
            weight *= growth
        return best

    return by_slabs(grouped, search)


def _large_part(best: BestScale, norm: float, beta: float) -> torch.Tensor:
    """Return the errors of the best scales, shrunk towards zero: same shape."""
    steps = best.values / best.scale.unsqueeze(-1) - best.codes(best.zero_point)
    return dequantize(shrink(steps, norm, beta), best.scale, None)


def shrink(error: torch.Tensor, norm: float, beta: float) -> torch.Tensor:
    """Return ``sign(error) * max(|error| - |error| ** (norm - 1) / beta, 0)``: same shape."""
    size = error.abs()
    return error.sign() * (size - size.pow(norm - 1) / beta).clamp_min_(0)
