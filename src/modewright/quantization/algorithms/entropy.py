# SPDX-License-Identifier: Apache-2.0
r"""Ranges that are searched for in a histogram: least divergence, or least squared error.

Both try to cut the range that was seen to magnitudes below a threshold, which shortens its longer
end first. They differ in what they minimise:

* **Entropy**: the Kullback-Leibler divergence between what was seen and what codes still tell
  (Migacz 2017, "8-bit Inference with TensorRT"). In what was seen, values beyond the threshold
  count to the last bin within. What codes tell knows nothing of those: each code's share is spread
  evenly over the bins that it stands for and that hold values. In a handful of bins that count for
  all the rest nothing could be lost, so a range has to hold as many bins as there are codes, or
  almost all values.
* **Squared error** of quantizing the centres of bins, each as often as it was seen. The whole range
  is tried too, so the result is never worse.

The codes are those of the format, whichever it is. Where thresholds are equally good the smallest
is taken, as the steps between its codes are finer than the bins can show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize, quantize
from modewright.formats.catalogue import NumberFormat, encode
from modewright.formats.scaling import scale_from_range
from modewright.quantization.algorithms.percentile import Histogram, seen_range

Range = tuple[torch.Tensor, torch.Tensor]

_SMALLEST_PART = 2.0**-10  # of the largest magnitude: bins are too coarse for less
_ALMOST_ALL = 0.99
_CODES = 256


def entropy_range(histogram: Histogram, fmt: NumberFormat, *, steps: int = 128) -> Range:
    """Return the range whose codes tell most about the values, by Kullback-Leibler divergence.

    Args:
        histogram: How often values were seen.
        fmt: The format of the codes.
        steps: How many thresholds are tried.

    Returns:
        Minimum and maximum, scalars of the dtype of the histogram's range.

    Raises:
        ConfigError: There are no steps.
        DataError: Nothing was seen.
    """
    trials = _trials(histogram, _without_zeros(histogram), fmt, steps)
    seen, told = told_apart(trials.share, trials.inside, encode(trials.codes, fmt).long())
    enough = trials.inside.sum(1) >= min(1 << fmt.num_bits, len(trials.share))
    enough |= trials.inside.float() @ trials.share >= _ALMOST_ALL
    return trials.best(torch.where(enough, divergence(seen, told), torch.inf))


def mse_range(histogram: Histogram, fmt: NumberFormat, *, steps: int = 128) -> Range:
    """Return the range that moves the values least when they are quantized, in squared error.

    Args:
        histogram: How often values were seen.
        fmt: The format of the codes.
        steps: How many thresholds are tried.

    Returns:
        Minimum and maximum, scalars of the dtype of the histogram's range.

    Raises:
        ConfigError: There are no steps.
        DataError: Nothing was seen.
    """
    trials = _trials(histogram, histogram.counts, fmt, steps)
    return trials.best((trials.remains - trials.centres).square() @ trials.share)


def told_apart(
    share: torch.Tensor, inside: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what was seen, cut to the bins inside, and what codes tell of it.

    Args:
        share: What part of the values each bin holds, ``[bins]``, none empty.
        inside: Which neighbouring bins each threshold keeps, ``[thresholds, bins]`` bool.
        codes: The code of every bin, below 256, same shape, int64.

    Returns:
        Two distributions over the bins, ``[thresholds, bins]``; their sums need not be 1.
    """
    kept = share * inside
    empty = torch.zeros(len(codes), _CODES, device=share.device)
    of_code = empty.scatter_add(1, codes, kept) / empty.scatter_add(1, codes, inside.float())
    told = torch.where(inside, of_code.gather(1, codes), 0.0)
    begun = inside.cumsum(1) > 0
    first = (~begun).sum(1, keepdim=True).clamp_max(len(share) - 1)
    last = (first + inside.sum(1, keepdim=True) - 1).clamp_min(0)
    below = (share * ~begun).sum(1, keepdim=True)
    above = (share * (begun & ~inside)).sum(1, keepdim=True)
    return kept.scatter_add(1, first, below).scatter_add(1, last, above), told


def divergence(seen: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of ``told`` from ``seen``.

    Args:
        seen: ``[..., bins]``, scaled to sum 1 first. What was not seen counts nothing.
        told: The same shape, scaled too.

    Returns:
        ``[...]``, in nats.
    """
    seen = seen / seen.sum(dim=-1, keepdim=True)
    told = told / told.sum(dim=-1, keepdim=True)
    terms = seen * (seen.log() - told.log())
    return torch.where(seen > 0, terms, 0.0).sum(dim=-1)


@dataclass(frozen=True)
class _Trials:
    """What every threshold would do to the bins that hold values.

    Attributes:
        low: The smallest value, scalar.
        high: The largest one.
        thresholds: Magnitudes to cut at, relative to the largest, ascending, ``[thresholds]``.
        centres: The centres of the bins, relative too, ascending, ``[bins]``.
        share: What part of the values each bin holds, ``[bins]``.
        inside: Which bins a threshold keeps, ``[thresholds, bins]``.
        codes: The numbers that stand for the centres, same shape.
        remains: What remains of the centres, same shape.
    """

    low: torch.Tensor
    high: torch.Tensor
    thresholds: torch.Tensor
    centres: torch.Tensor
    share: torch.Tensor
    inside: torch.Tensor
    codes: torch.Tensor
    remains: torch.Tensor

    def best(self, costs: torch.Tensor) -> Range:
        """Return the range with the least cost; where it is NaN nothing was inside."""
        threshold = self.thresholds[costs.nan_to_num(torch.inf).argmin()]
        threshold = threshold.to(self.low) * torch.maximum(-self.low, self.high)
        return torch.maximum(self.low, -threshold), torch.minimum(self.high, threshold)


def _without_zeros(histogram: Histogram) -> torch.Tensor:
    """Return the counts without a peak at zero, as ReLU makes one: ``[bins]``.

    Zero is exact in every format, so codes tell all about it; spread over the bins beside it, it
    would look lost. The bin around it counts no more than the larger one beside it.
    """
    counts = histogram.counts.clone()
    place = int(torch.searchsorted(histogram.edges, 0.0, right=True)) - 1
    if not 0 <= place < len(counts):
        return counts
    beside = torch.cat([counts[max(place - 1, 0) : place], counts[place + 1 : place + 2]])
    counts[place] = torch.minimum(counts[place], beside.amax())
    return counts if counts.any() else histogram.counts


def _trials(histogram: Histogram, counts: torch.Tensor, fmt: NumberFormat, steps: int) -> _Trials:
    if steps < 1:
        raise ConfigError(f"expected one step or more; received {steps}.")
    low, high = seen_range(histogram)
    unit = torch.maximum(-low, high).float()
    unit = torch.where(unit > 0, unit, 1.0)
    filled = torch.nonzero(counts).flatten()
    share = counts[filled].float()
    ends = histogram.edges / 2  # so that their sum does not overflow
    centres = (ends[:-1] + ends[1:])[filled].clamp(low, high) / unit
    thresholds = _SMALLEST_PART ** torch.linspace(1, 0, steps, device=share.device)
    thresholds[-1] = 1.0  # the whole range, also as the only one
    scale, zero_point = scale_from_range(
        torch.maximum(low / unit, -thresholds).unsqueeze(1),
        torch.minimum(high / unit, thresholds).unsqueeze(1),
        fmt,
    )
    codes = quantize(centres.expand(steps, 1, len(centres)), scale, zero_point, fmt)
    return _Trials(
        low,
        high,
        thresholds,
        centres,
        share / share.sum(),
        centres.abs() <= thresholds.unsqueeze(1),
        codes.squeeze(1),
        dequantize(codes, scale, zero_point).squeeze(1),
    )
