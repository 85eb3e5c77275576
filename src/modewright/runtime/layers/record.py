# SPDX-License-Identifier: Apache-2.0
"""``LayerRecord``: what a packed layer is, as JSON; from it and the plain layer it is rebuilt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from modewright.errors import ConfigError
from modewright.runtime.activations import ActivationSpec
from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import TENSORS

INPUT_TENSORS = ("scale", "zero_point")
TRANSFORMS = ("pre_quant_scale", "low_rank_down", "low_rank_up")


@dataclass(frozen=True)
class PackedParameter:
    """How a parameter of any shape lies in a matrix ``[out, in]``.

    Attributes:
        spec: The matrix.
        shape: The parameter's shape.
        order: The order in which the matrix has its axes.
        row_axes: How many of them, from the first, make the rows: the output channels, or experts
            and their output channels.

    Raises:
        ConfigError: They do not fit together.
    """

    spec: PackedSpec
    shape: tuple[int, ...]
    order: tuple[int, ...]
    row_axes: int = 1

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.order, self.row_axes)
        fits = all(type(number) is int and number >= 0 for number in numbers)
        fits = fits and sorted(self.order) == list(range(len(self.shape)))
        fits = fits and 1 <= self.row_axes <= max(len(self.shape), 1)
        if fits:
            sizes = [self.shape[axis] for axis in self.order]
            rows = math.prod(sizes[: self.row_axes])
            fits = (rows, math.prod(sizes[self.row_axes :])) == self.spec.shape
        if not fits:
            raise ConfigError(
                f"a parameter of shape {list(self.shape)} with its axes in the order "
                f"{list(self.order)}, {self.row_axes} of them rows, is no matrix of shape "
                f"{list(self.spec.shape)}."
            )

    @property
    def feature_axis(self) -> int:
        """The axis of input features in the parameter: the first of those in a row."""
        return self.order[self.row_axes] if self.row_axes < len(self.order) else self.order[-1]

    def to_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the parameter's shape as the matrix."""
        return tensor.permute(self.order).reshape(self.spec.shape)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix as a tensor of the parameter's shape."""
        sizes = [self.shape[axis] for axis in self.order]
        inverse = [self.order.index(axis) for axis in range(len(sizes))]
        return matrix.reshape(sizes).permute(inverse)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "spec": self.spec.as_dict(),
            "shape": list(self.shape),
            "order": list(self.order),
            "row_axes": self.row_axes,
        }

    @classmethod
    def from_dict(cls, recorded: object) -> PackedParameter:
        """Return what :meth:`as_dict` described.

        Raises:
            ConfigError: It is no description of one.
        """
        if (
            not isinstance(recorded, Mapping)
            or set(recorded) != {"spec", "shape", "order", "row_axes"}
            or not isinstance(recorded["shape"], list)
            or not isinstance(recorded["order"], list)
        ):
            raise ConfigError(
                f"expected a packed parameter: spec, shape, order, row_axes; received {recorded!r}."
            )
        spec, row_axes = PackedSpec.from_dict(recorded["spec"]), recorded["row_axes"]
        return cls(spec, tuple(recorded["shape"]), tuple(recorded["order"]), row_axes)


@dataclass(frozen=True)
class LayerRecord:
    """What a packed layer is.

    Attributes:
        parameters: What is packed, by the parameter's name.
        activations: How ``input`` and ``output`` are quantized; those left out are not.
        transforms: Shapes of the buffers that change the input or go beside the weight.
        hadamard_size: Blocks of that many input features are rotated; 0 for none.
    """

    parameters: dict[str, PackedParameter]
    activations: dict[str, ActivationSpec] = field(default_factory=dict)
    transforms: dict[str, tuple[int, ...]] = field(default_factory=dict)
    hadamard_size: int = 0

    def buffers(self) -> list[str]:
        """Return the names of the buffers that hold packed parameters and input scales."""
        packed = [f"{name}_{part}" for name in self.parameters for part in TENSORS]
        return [*packed, *(f"{n}_{part}" for n in self.activations for part in INPUT_TENSORS)]

    def allocate_inputs(
        self, dtype: torch.dtype, device: torch.device | None
    ) -> dict[str, torch.Tensor | None]:
        """Return room for everything but packed parameters; values are loaded later."""
        made: dict[str, torch.Tensor | None] = {
            name: torch.full(shape, torch.nan, dtype=dtype, device=device)
            for name, shape in self.transforms.items()
        }
        for name, spec in self.activations.items():
            there = (spec.calibrated, spec.calibrated and not spec.number_format.signed)
            for part, calibrated in zip(INPUT_TENSORS, there, strict=True):
                nan = torch.full((1, 1), torch.nan, device=device)
                made[f"{name}_{part}"] = nan if calibrated else None
        return {**dict.fromkeys(TRANSFORMS), **made}

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON; what is empty is left out."""
        found = {
            "parameters": {name: p.as_dict() for name, p in self.parameters.items()},
            "activations": {name: a.as_dict() for name, a in self.activations.items()},
            "transforms": {name: list(shape) for name, shape in self.transforms.items()},
            "hadamard_size": self.hadamard_size,
        }
        return {name: value for name, value in found.items() if value}

    @classmethod
    def from_dict(cls, recorded: object) -> LayerRecord:
        """Return what :meth:`as_dict` described.

        Raises:
            ConfigError: It is no description of one.
        """
        known = {"parameters", "activations", "transforms", "hadamard_size"}
        parts = recorded if isinstance(recorded, Mapping) else {}
        tables = [parts.get(n, {}) for n in ("parameters", "activations", "transforms")]
        size = parts.get("hadamard_size", 0)
        if (
            not known >= set(parts) >= {"parameters"}
            or not all(isinstance(table, Mapping) for table in tables)
            or not set(tables[1]) <= {"input", "output"}
            or not set(tables[2]) <= set(TRANSFORMS)
            or not all(_is_shape(shape) for shape in tables[2].values())
            or type(size) is not int
            or size < 0
        ):
            raise ConfigError(
                f"expected the description of a packed layer, with {sorted(known)}; received "
                f"{str(recorded)[:200]}."
            )
        return cls(
            {name: PackedParameter.from_dict(p) for name, p in tables[0].items()},
            {name: ActivationSpec.from_dict(a) for name, a in tables[1].items()},
            {name: tuple(shape) for name, shape in tables[2].items()},
            size,
        )


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
