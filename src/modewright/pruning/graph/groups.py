# SPDX-License-Identifier: Apache-2.0
"""What tracing finds: groups of dimensions that are cut together, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from modewright.errors import MatchError, did_you_mean

Kind = Literal["channels", "heads", "ffn", "hidden", "experts"]
Role = Literal["out", "in"]


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie along one axis of one tensor.

    Attributes:
        tensor: Path of the parameter or buffer; of tied ones, the first path.
        axis: The axis that is cut.
        role: ``"out"`` where the tensor makes the dimension (rows of a linear layer, its bias, a
            norm's scale), ``"in"`` where it takes it in (columns of the next layer).
        indices: ``[units, k]`` int64: row ``u`` holds the indices that belong to unit ``u``.
    """

    tensor: str
    axis: int
    role: Role
    indices: torch.Tensor = field(repr=False)

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Attribute:
    """A number that a module keeps and that goes down by ``per_unit`` with every removed unit."""

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class DimensionGroup:
    """One dimension of a network, as wide as ``size`` units that can be removed one by one.

    Attributes:
        name: Path of the first module that makes the dimension.
        kind: ``channels`` of a convolutional network, ``heads`` (with grouped queries a unit is a
            key-value head and its queries), ``ffn`` (inner width between linear layers), ``hidden``
            (a residual stream of a transformer), ``experts``.
        size: The number of units.
        slices: Every place where the dimension occurs.
        attributes: Numbers that follow, beside those every layer class has (``out_features`` ...).
        modules: Paths of module lists whose ``u``-th member is unit ``u``.
        exact: Whether removing units that nothing takes in leaves all else as it was. Not so where
            a norm, softmax or mean runs over the dimension.
        minimum: How many units must stay at least.
        multiple: The number of units that stay must be a multiple of this (some kernels want it).
    """

    name: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    modules: tuple[str, ...] = ()
    exact: bool = True
    minimum: int = 1
    multiple: int = 1

    @property
    def producers(self) -> tuple[Slice, ...]:
        """The slices that make the dimension."""
        return tuple(s for s in self.slices if s.role == "out")

    @property
    def consumers(self) -> tuple[Slice, ...]:
        """The slices that take the dimension in."""
        return tuple(s for s in self.slices if s.role == "in")

    def __str__(self) -> str:
        places = ", ".join(f"{s.tensor}[{s.axis}]" for s in self.slices[:4])
        more = f" and {len(self.slices) - 4} more" if len(self.slices) > 4 else ""
        return f"{self.name}: {self.size} {self.kind} in {places}{more}"


@dataclass(frozen=True)
class DimensionGraph:
    """All dimensions of a network that can be cut.

    Attributes:
        groups: In the order of the network.
        untraced: By path of a module whose output dimension is left alone, the reason.
    """

    groups: tuple[DimensionGroup, ...]
    untraced: dict[str, str]

    def __getitem__(self, name: str) -> DimensionGroup:
        """Return a group by its name.

        Raises:
            MatchError: There is no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        names = [group.name for group in self.groups]
        raise MatchError(
            f"There is no dimension group {name!r}.{did_you_mean(name, names)} "
            f"Known: {', '.join(names) or 'none'}."
        )

    def __str__(self) -> str:
        lines = [str(group) for group in self.groups]
        lines += [f"{path}: left alone, {reason}" for path, reason in self.untraced.items()]
        return "\n".join(lines)
