# SPDX-License-Identifier: Apache-2.0
"""How often each value was seen: a histogram of fixed size that merges exactly.

Its range is ``[-2**e, 2**e)``, the smallest that holds every value, cut into a fixed number of
bins. When a larger value comes the range doubles and every two bins become one, so where a value
ends up does not depend on what came before it: parts of the data merge to what the whole gives,
bin by bin.
"""

from __future__ import annotations

import math

import torch

from modewright.calibration.statistics import RangeObserver, Statistic
from modewright.errors import ConfigError, DataError

_SMALLEST_EXPONENT = -100  # of the range; smaller values all count as (almost) zero


class HistogramObserver:
    """Watches one tensor: how often each of its values was seen.

    Values that are not finite in float32 are in no bin and not in the range; they are counted.

    Args:
        bins: How many bins there are, half of them below zero: a power of two, 4 or more.

    Raises:
        ConfigError: ``bins`` is no such number.
    """

    def __init__(self, bins: int = 8192) -> None:
        if bins < 4 or bins & (bins - 1):
            raise ConfigError(f"bins has to be a power of two, 4 or more; received {bins}.")
        self.bins = bins
        self.exponent = _SMALLEST_EXPONENT
        self._counts = Statistic("sum")
        self._nonfinite = Statistic("sum")
        self._range = RangeObserver()

    def update(self, tensor: torch.Tensor) -> None:
        """Take in one batch; an empty one counts for nothing."""
        values = tensor.detach().float().flatten()
        finite = values.isfinite()
        if not finite.all():
            self._nonfinite.update((~finite).sum())
            values = values[finite]
        if values.numel():
            self._range.update(values)
            largest = values.abs().amax().item()
            self._grow(math.frexp(largest)[1] if largest else _SMALLEST_EXPONENT)
            self._counts.update(self._counted(values))

    def merge(self, other: HistogramObserver) -> None:
        """Take in what another observer saw.

        Raises:
            DataError: It has another number of bins.
        """
        if self.bins != other.bins:
            raise DataError(f"histograms of {self.bins} and of {other.bins} bins cannot merge.")
        self._nonfinite.merge(other._nonfinite)
        self._range.merge(other._range)
        if other._counts.value is not None:
            self._grow(other.exponent)
            folded = _folded(other._counts.value, self.exponent - other.exponent)
            self._counts.update(folded)

    @property
    def counts(self) -> torch.Tensor:
        """How many values each bin holds, ``[bins]`` int64."""
        value = self._counts.value
        return torch.zeros(self.bins, dtype=torch.int64) if value is None else value

    @property
    def edges(self) -> torch.Tensor:
        """Where bins begin and end, ``[bins + 1]`` float32, exact; a bin has its lower end."""
        half = self.bins // 2
        places = torch.arange(-half, half + 1, device=self.counts.device)
        return places.float() * self._width

    @property
    def range(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The smallest and largest finite value, scalars; ``None`` if none was seen."""
        return self._range.range

    @property
    def nonfinite(self) -> int:
        """How many values were NaN or infinite."""
        return 0 if self._nonfinite.value is None else int(self._nonfinite.value)

    @property
    def _width(self) -> float:
        """The width of a bin: a power of two, so that dividing by it is exact."""
        return 2.0 ** (self.exponent + 1) / self.bins

    def _counted(self, values: torch.Tensor) -> torch.Tensor:
        places = torch.floor(values / self._width)
        places = torch.where(values < 0, places.clamp_max(-1), places)  # the quotient may underflow
        return torch.bincount(places.long() + self.bins // 2, minlength=self.bins)

    def _grow(self, exponent: int) -> None:
        """Make the range at least ``2**exponent`` to both sides."""
        if exponent > self.exponent:
            if self._counts.value is not None:
                self._counts.value = _folded(self._counts.value, exponent - self.exponent)
            self.exponent = exponent


def _folded(counts: torch.Tensor, doublings: int) -> torch.Tensor:
    """Return the counts after the range has doubled so many times: same shape."""
    half = len(counts) // 2
    places = torch.arange(-half, half, device=counts.device) >> min(doublings, 62)
    return torch.zeros_like(counts).index_add_(0, places + half, counts)
