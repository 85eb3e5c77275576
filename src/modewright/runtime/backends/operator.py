# SPDX-License-Identifier: Apache-2.0
"""The product with a packed weight as one operator of torch: ``modewright::packed_linear``.

``torch.compile`` cannot look into a kernel that is called through ctypes; it leaves an operator as
it is and compiles what is around it. An operator takes tensors and plain values, no objects: so it
is given the tensors of a weight and the fields of its spec, and finds what backends prepared for
them by the tensor of codes. Nothing here keeps a weight alive.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import PackedWeight

Product = Callable[
    [PackedWeight, torch.Tensor, torch.Tensor | None, str | None, torch.Tensor | None], torch.Tensor
]

_NAME = "modewright::packed_linear"
_SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? global_scale, "
    "Tensor? bias, Tensor? act_scale, str? act, str format, int[] shape, str granularity, "
    "int? group_size, int[]? block_size, str scale_format, str scale_dtype) -> Tensor"
)
# By the tensor of codes; the weights hold other views of them. With what they were made of.
_weights: MutableMapping[Any, tuple[PackedWeight, object]] = WeakTensorKeyDictionary()


def register(product: Product) -> None:
    """Make the operator known to torch.

    Args:
        product: What computes it, from a weight, activations, a bias, and how these activations
            are quantized.
    """

    def packed_linear(
        x: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        global_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        act_scale: torch.Tensor | None,
        act: str | None,
        *spec: object,
    ) -> torch.Tensor:
        weight = _weight_of((packed, scale, zero_point, global_scale), spec)
        return product(weight, x, bias, act, act_scale).contiguous()

    def shape_of(x: torch.Tensor, packed: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], packed.shape[0])

    torch.library.define(_NAME, _SCHEMA)
    torch.library.impl(_NAME, "CompositeExplicitAutograd", packed_linear)
    torch.library.register_fake(_NAME, shape_of)


def packed_linear(
    weight: PackedWeight,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    act: str | None,
    act_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` by the operator."""
    spec = weight.spec
    product: torch.Tensor = torch.ops.modewright.packed_linear(
        x,
        weight.packed,
        weight.scale,
        weight.zero_point,
        weight.global_scale,
        bias,
        act_scale,
        act,
        spec.format,
        spec.shape,
        spec.granularity,
        spec.group_size,
        spec.block_size,
        spec.scale_format,
        spec.scale_dtype,
    )
    return product


def _weight_of(tensors: tuple[torch.Tensor | None, ...], spec: tuple[object, ...]) -> PackedWeight:
    """Return the weight that was made of such tensors, as long as they are where they were."""
    places = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    kept = _weights.get(tensors[0])
    if kept is not None and kept[1] == (places, spec):
        return kept[0]
    fields: Any = (tuple(field) if isinstance(field, list) else field for field in spec)
    views: Any = (None if tensor is None else tensor.detach() for tensor in tensors)
    weight = PackedWeight(PackedSpec(*fields), *views)
    _weights[tensors[0]] = (weight, (places, spec))
    return weight
