# SPDX-License-Identifier: Apache-2.0
"""Packed experts: only those are unpacked that tokens were sent to.

A forward that reads ``self.gate_up_proj[expert]`` gets that one expert's matrix; one that computes
with all of them at once gets all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from modewright.runtime.layers.base import PackedLayer


class PackedExperts(PackedLayer):
    """Packed parameters ``[experts, ...]`` of fused experts."""

    def quantized_parameter(self, name: str) -> torch.Tensor:  # noqa: D102
        return super().quantized_parameter(name).contiguous()

    def read_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter that is unpacked when something is computed with it."""
        return ExpertWeights.of(self, name)

    def expert(self, name: str, number: int) -> torch.Tensor:
        """Return the part of a parameter that belongs to one expert."""
        parameter = self.record.parameters[name]
        experts = parameter.shape[0]
        each = parameter.spec.shape[0] // experts
        number = range(experts)[number]
        rows = slice(number * each, (number + 1) * each)
        matrix = self.packed_weight(name).dequantize(rows, self.compute_dtype)
        sizes = [parameter.shape[axis] for axis in parameter.order[1:]]
        inverse = [parameter.order[1:].index(axis) for axis in range(1, len(parameter.shape))]
        return matrix.reshape(sizes).permute(inverse).contiguous()


class ExpertWeights(torch.Tensor):
    """A parameter of fused experts that is unpacked one expert at a time, where that is enough."""

    _layer: PackedExperts
    _name: str

    @staticmethod
    def of(layer: PackedExperts, name: str) -> ExpertWeights:
        """Return the parameter of a layer."""
        empty = torch.empty(
            layer.record.parameters[name].shape, dtype=layer.compute_dtype, device="meta"
        )
        made = empty.as_subclass(ExpertWeights)
        made._layer, made._name = layer, name
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the packed tensors are."""
        return self._layer.packed_weight(self._name).device

    def unpacked(self) -> torch.Tensor:
        """Return the whole parameter."""
        return self._layer.quantized_parameter(self._name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Unpack one expert for an index, nothing for sizes, everything for all else."""
        if func is torch.Tensor.__getitem__ and isinstance(args[0], ExpertWeights):
            number = _index(args[1])
            if number is not None:
                return args[0]._layer.expert(args[0]._name, number)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _SIZES:
                return func(*args, **(kwargs or {}))
            return func(*_unpacked(args), **_unpacked(dict(kwargs or {})))


_SIZES = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
}


def _index(value: Any) -> int | None:
    """Return the number of one expert; ``None`` for any other index."""
    if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_floating_point():
        return None if value.dtype == torch.bool else int(value)
    return value if type(value) is int else None


def _unpacked(value: Any) -> Any:
    if isinstance(value, ExpertWeights):
        return value.unpacked()
    if type(value) in (tuple, list):
        return type(value)(_unpacked(item) for item in value)
    if type(value) is dict:
        return {key: _unpacked(item) for key, item in value.items()}
    return value
