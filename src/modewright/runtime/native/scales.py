# SPDX-License-Identifier: Apache-2.0
"""Scales of least squared error by the kernel library: the search of integers, on the CPU.

It tries what :mod:`modewright.quantization.algorithms.mse` tries, with the values of a group in
registers all the while, where tensor operations go through memory for each scale that is tried.
"""

from __future__ import annotations

import ctypes

import torch

from modewright.runtime.native.library import BEST, ISAS, library


class SearchStruct(ctypes.Structure):
    """``mw::ScaleSearch`` of ``source/kernel.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "counts", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "size")),
        *((name, ctypes.c_float) for name in ("low", "high", "shrink", "highest")),
        *((name, ctypes.c_int32) for name in ("steps", "has_zero", "counts_of_rows")),
    )


def search_scales(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    *,
    code_range: tuple[float, float],
    highest: float,
    importance: torch.Tensor | None,
    steps: int,
    shrink: float,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return better scales and zero points than those to begin with, where there are any.

    Args:
        grouped: ``[rows, groups, group]`` float32.
        scale: The max scales, ``[rows, groups]`` float32.
        zero_point: The same shape, or ``None`` for symmetric codes.
        code_range: The smallest and the largest code.
        highest: The largest multiple of a symmetric scale that is tried.
        importance: What squared errors count, broadcastable to ``grouped``, or ``None``.
        steps: Places that each end of a range is moved to.
        shrink: The smallest part of the max range that is tried.
        isa: The instruction set, for tests; the best one by default.

    Returns:
        Scales and zero points; ``None`` where the library is missing or a tensor is elsewhere.
    """
    kernels = library()
    if isinstance(kernels, str) or not grouped.is_cpu or grouped.dtype != torch.float32:
        return None
    grouped, scale = grouped.contiguous(), scale.clone().contiguous()
    zero_point = None if zero_point is None else zero_point.clone().contiguous()
    of_rows = False
    if importance is not None:
        importance = importance.float().expand(grouped.shape)
        of_rows = len(grouped) > 1 and importance.stride(0) != 0
        importance = (importance if of_rows else importance[0]).contiguous()
    rows, groups, size = grouped.shape
    struct = SearchStruct(
        values=grouped.data_ptr(),
        counts=None if importance is None else importance.data_ptr(),
        scale=scale.data_ptr(),
        zero=None if zero_point is None else zero_point.data_ptr(),
        rows=rows,
        groups=groups,
        size=size,
        low=code_range[0],
        high=code_range[1],
        shrink=shrink,
        highest=highest,
        steps=steps,
        has_zero=zero_point is not None,
        counts_of_rows=of_rows,
    )
    place = BEST if isa is None else ISAS.index(isa)
    kernels.search_scales(ctypes.addressof(struct), place, torch.get_num_threads())
    return scale, zero_point
