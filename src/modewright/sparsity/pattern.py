# SPDX-License-Identifier: Apache-2.0
"""``Pattern``: where zeros may lie in a weight. Imports no torch, so that it can be shown fast.

A weight is looked at as the matrix ``[out, in]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from modewright.errors import ConfigError

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie.

    Attributes:
        kept: Of every ``of`` neighbouring inputs of an output so many keep their weight; 0 if the
            pattern has no such groups.
        of: See ``kept``.
        tile: Outputs and inputs of a tile that is zero or not as a whole; ``(1, 1)`` for single
            weights.
    """

    kept: int = 0
    of: int = 0
    tile: tuple[int, int] = (1, 1)

    @property
    def fixed_sparsity(self) -> float | None:
        """The part of zeros that the pattern itself says; ``None`` if it leaves that open."""
        return 1 - self.kept / self.of if self.of else None

    def __str__(self) -> str:
        """Return the pattern as it is written in a config."""
        if self.of:
            return f"{self.kept}:{self.of}"
        return UNSTRUCTURED if self.tile == (1, 1) else "{}x{}".format(*self.tile)


def parse_pattern(text: str) -> Pattern:
    """Read ``"2:4"`` (two of four are kept), ``"unstructured"`` or ``"16x16"`` (tiles).

    Raises:
        ConfigError: It is none of these.
    """
    if text == UNSTRUCTURED:
        return Pattern()
    groups = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if groups and 0 < int(groups[1]) < int(groups[2]):
        return Pattern(kept=int(groups[1]), of=int(groups[2]))
    tile = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if tile and int(tile[1]) and int(tile[2]):
        return Pattern(tile=(int(tile[1]), int(tile[2])))
    raise ConfigError(
        f"expected a pattern 'N:M' with 0 < N < M (N of M neighbouring inputs keep their weight), "
        f"'RxC' (tiles of R outputs by C inputs) or {UNSTRUCTURED!r}; received {text!r}."
    )
