# SPDX-License-Identifier: Apache-2.0
"""Integer formats."""

from __future__ import annotations

from dataclasses import dataclass

from modewright.errors import ConfigError


@dataclass(frozen=True)
class IntegerFormat:
    """An integer format; everything else follows from these two facts.

    Attributes:
        num_bits: Width of a code.
        signed: Two's complement codes around zero, for symmetric quantization; unsigned codes
            otherwise, with a zero point.
    """

    num_bits: int
    signed: bool

    @property
    def name(self) -> str:
        """``int4``, ``uint4`` ..."""
        return f"{'' if self.signed else 'u'}int{self.num_bits}"

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.num_bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.num_bits - 1)) - 1 if self.signed else (1 << self.num_bits) - 1

    @property
    def max_value(self) -> float:
        """The magnitude that a max scale maps the largest magnitude of a group to."""
        return float(self.qmax)

    @property
    def min_value(self) -> float:
        """The smallest value of a code."""
        return float(self.qmin)


ALL_INTEGER_FORMATS: tuple[IntegerFormat, ...] = tuple(
    IntegerFormat(bits, signed) for signed in (True, False) for bits in range(2, 9)
)


def integer_format(num_bits: int, *, symmetric: bool) -> IntegerFormat:
    """Return the format of that width: signed if symmetric, unsigned if not.

    Raises:
        ConfigError: There is no such width.
    """
    for fmt in ALL_INTEGER_FORMATS:
        if fmt.num_bits == num_bits and fmt.signed is symmetric:
            return fmt
    raise ConfigError(f"num_bits must be 2 to 8; received {num_bits!r}.")
