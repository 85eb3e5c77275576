# SPDX-License-Identifier: Apache-2.0
"""Rows of activations on a GPU: quantized, and products of their codes scaled, in one pass each."""

from __future__ import annotations

import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from modewright.formats.scaling import SMALLEST_FP32
from modewright.runtime.activations import FP8_TENSOR, FP8_TOKEN, INT8_TENSOR, INT8_TOKEN

_CODES = {
    # activations: (dtype of their codes, the largest)
    INT8_TOKEN: (torch.int8, 127.0),
    INT8_TENSOR: (torch.int8, 127.0),
    FP8_TOKEN: (torch.float8_e4m3fn, 448.0),
    FP8_TENSOR: (torch.float8_e4m3fn, 448.0),
}
_LONGEST_TILE = 4096


def has_kernels(device: str) -> bool:
    """Whether modewright's Triton kernels run on a kind of device."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return the context in which kernels are launched where a tensor is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def knows(act: str | None) -> bool:
    """Whether activations are quantized in a way that the kernel has."""
    return act in _CODES


def quantize_rows(
    rows: torch.Tensor, act: str, act_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of rows ``[M, K]``, int8 or fp8_e4m3, and their scales ``[M, 1]``.

    A row whose scale cannot be told, or that holds a NaN, gets a scale of NaN.
    """
    return _quantized(rows, act, act_scale, _CODES[act][0])


def simulate_rows(rows: torch.Tensor, act: str, act_scale: torch.Tensor | None) -> torch.Tensor:
    """Return what quantization leaves of rows ``[M, K]``, in their dtype."""
    return _quantized(rows, act, act_scale, rows.dtype)[0]


def scale_product(
    product: torch.Tensor,
    row_scales: torch.Tensor,
    output_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return a product of codes as numbers.

    Args:
        product: ``[M, N]``, int32 or float32.
        row_scales: ``[M, 1]`` float32.
        output_scales: ``[N]`` float32.
        bias: ``[N]`` or ``None``.
        dtype: Of the result.
    """
    count, outputs = product.shape
    result = product.new_empty(count, outputs, dtype=dtype)
    tile = min(_LONGEST_TILE, 1 << (outputs - 1).bit_length())
    with on_device_of(product):
        _kernels().scaled[(count, -(-outputs // tile))](
            *(product, row_scales, output_scales, product if bias is None else bias, result),
            outputs,
            HAS_BIAS=bias is not None,
            OUTPUTS=tile,
            num_warps=8,
        )
    return result


def _quantized(
    rows: torch.Tensor, act: str, act_scale: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows; what comes out are values if it has their dtype."""
    codes, largest = _CODES[act]
    result = torch.empty_like(rows, dtype=dtype)
    scales = rows.new_empty(len(rows), 1, dtype=torch.float32)
    if not len(rows):
        return result, scales
    with on_device_of(rows):
        _kernels().quantized[(len(rows),)](
            *(rows, scales if act_scale is None else act_scale, result, scales, rows.shape[1]),
            SMALLEST=SMALLEST_FP32,
            LARGEST=largest,
            IS_INTEGER=codes is torch.int8,
            IS_GIVEN=act_scale is not None,
            AS_VALUES=dtype is rows.dtype,
            COLUMNS=min(_LONGEST_TILE, 1 << (rows.shape[1] - 1).bit_length()),
            num_warps=8,
        )
    return result, scales


@cache
def _kernels() -> Any:
    return importlib.import_module("modewright.runtime.backends.triton_rows")
