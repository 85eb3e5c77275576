# SPDX-License-Identifier: Apache-2.0
"""Weights as matrices ``[out, in]``, and inputs as the rows that these multiply.

A convolution is the product of its flattened kernels with the patches that they slide over; fused
experts are one matrix under the other.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.layers.experts import fused_parameters, is_transposed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matrix_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's parameters that are matrices to algorithms; empty for others.

    Those of linear layers, convolutions and fused experts, and the input projections of
    ``nn.MultiheadAttention``.
    """
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(n for n in names if module._parameters.get(n) is not None)
    kinds = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS)
    if isinstance(module, kinds) or transposed_linear(type(module)) is not None:
        return ("weight",)
    return fused_parameters(module)


def to_matrix(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the shape of a parameter as ``[out, in]``."""
    if tensor.ndim == 3 and name in fused_parameters(module):
        return (tensor.transpose(1, 2) if is_transposed(module, name) else tensor).flatten(0, 1)
    return tensor.movedim(_channel_axis(module), 0).flatten(1)


def from_matrix(module: nn.Module, name: str, matrix: torch.Tensor) -> torch.Tensor:
    """Return the inverse of :func:`to_matrix`: a tensor of the parameter's shape, contiguous."""
    shape = cast(torch.Tensor, module._parameters[name]).shape
    if len(shape) == 3 and name in fused_parameters(module):
        if not is_transposed(module, name):
            return matrix.reshape(shape)
        return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
    axis = _channel_axis(module)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return matrix.reshape(moved).movedim(0, axis).contiguous()


def multiplies_rows(module: nn.Module) -> bool:
    """Whether a layer is the product of rows of its input with one matrix, its ``weight``."""
    if isinstance(module, _CONVOLUTIONS):
        return module.groups == 1
    return isinstance(module, nn.Linear) or transposed_linear(type(module)) is not None


def rows_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the rows ``[n, in]`` that the matrix of a layer multiplies; float32, detached.

    Args:
        module: A layer that :func:`multiplies_rows`.
        x: Its input.
    """
    x = x.detach().float()
    return patches(module, x) if isinstance(module, _CONVOLUTIONS) else x.reshape(-1, x.shape[-1])


def patches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the patches that the kernel of a convolution slides over, ``[n, in * kernel]``."""
    own = cast(nn.Conv2d, module)
    if x.ndim == len(own.kernel_size) + 1:
        x = x.unsqueeze(0)
    mode = "constant" if own.padding_mode == "zeros" else own.padding_mode
    x = F.pad(x, own._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(own.kernel_size, own.stride, own.dilation, strict=True)
    for axis, (size, step, dilation) in enumerate(sizes, start=2):
        reach = (size - 1) * dilation + 1
        x = x.unfold(axis, reach, step)[..., ::dilation]  # the window is a new last axis
    found = x.movedim(1, len(own.kernel_size) + 1)  # [batch, *positions, in, *kernel]
    return found.flatten(len(own.kernel_size) + 1).flatten(0, -2)


def transposed_linear(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return ``Conv1D`` of Transformers if a class is or derives from it; nothing is imported."""
    home = "transformers.pytorch_utils"
    found = (b for b in cls.__mro__ if b.__name__ == "Conv1D" and b.__module__ == home)
    return next(found, None)


def _channel_axis(module: nn.Module) -> int:
    turned = isinstance(module, _TRANSPOSED_CONVOLUTIONS)
    return 1 if turned or transposed_linear(type(module)) is not None else 0
