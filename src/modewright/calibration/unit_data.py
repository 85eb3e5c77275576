# SPDX-License-Identifier: Apache-2.0
"""``UnitData``: calibration data of one unit of a network of which no other unit is in memory.

A pass takes it wherever it takes batches. A unit is one block, or all that lies around the blocks.
The data of a block are the calls that it gets once the blocks before it went through the same pass;
what it puts out is kept, for the block after it. So one pass after another can go through a unit
before the next unit is looked at, and each sees what it would see in the whole network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from modewright.calibration.calls import Call

Original = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True)
class Place:
    """Which block of a network a unit is: its path, its number from 0, and how many there are."""

    name: str
    index: int
    total: int


class UnitData(ABC):
    """What one pass gets of the data; made anew for every pass over every unit.

    Attributes:
        network: The whole network with its quantizers and without weights: what a pass decides by
            all layers, it decides by these.
        place: Which block the unit is; ``None`` for what lies around the blocks.
    """

    network: nn.Module
    place: Place | None

    @abstractmethod
    def run(self, model: nn.Module) -> int:
        """Run all data through the unit as it is now; return the number of batches."""

    @abstractmethod
    def run_once(self, model: nn.Module) -> None:
        """Run the first batch through the unit, to see whether that works."""

    @abstractmethod
    def calls(self, as_original: Original | None = None) -> list[Call]:
        """Return how the block is called.

        Args:
            as_original: A context in which a module computes what it did before all conversions:
                given for the calls that the block gets in the original network.
        """

    @abstractmethod
    def keep(self, outputs: Sequence[torch.Tensor], *, original: bool = False) -> None:
        """Keep what the block puts out on these calls, for the block after it."""
