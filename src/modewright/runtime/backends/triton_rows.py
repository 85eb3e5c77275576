# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the rows of activations around a product: quantize them, scale what it gives.

Each does in one pass over memory what torch's operations do in ten. Imported only where Triton is.
"""

from __future__ import annotations

import triton
import triton.language as tl


# fmt: off
@triton.jit
def quantized(x, given, result, scales, columns_count, SMALLEST: tl.constexpr,
              LARGEST: tl.constexpr, IS_INTEGER: tl.constexpr, IS_GIVEN: tl.constexpr,
              AS_VALUES: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes of a row, or the values that they stand for, and the scale of the row.

    A row that holds a NaN, or an infinity if its scale comes from it, gets a scale of NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    peak = tl.zeros([COLUMNS], tl.float32)
    lost = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, columns_count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        where = x + row * columns_count + column
        size = tl.abs(tl.load(where, mask=column < columns_count, other=0.0).to(tl.float32))
        is_number = size <= float("inf") if IS_GIVEN else size < float("inf")
        lost |= tl.where(is_number, 0, 1)
        peak = tl.maximum(peak, tl.where(is_number, size, 0.0))
    if IS_GIVEN:
        scale = tl.load(given).to(tl.float32)
    else:
        scale = tl.math.div_rn(tl.max(peak, 0), LARGEST)
        scale = tl.where(scale < SMALLEST, 1.0, scale)
    known = tl.where(tl.max(lost, 0) == 0, scale, float("nan"))
    tl.store(scales + row, known)
    for start in range(0, columns_count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns_count
        where = row * columns_count + column
        value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        value = tl.math.div_rn(value, tl.zeros([COLUMNS], tl.float32) + scale)
        value = tl.minimum(tl.maximum(value, -LARGEST - 1.0 if IS_INTEGER else -LARGEST), LARGEST)
        # Adding 1.5 * 2 ** 23 steps leaves no bits for less than a step: ties go to the even one.
        if IS_INTEGER:
            high = 12582912.0
        else:
            power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            high = tl.maximum(power, 0.015625) * 1572864.0  # fp8_e4m3: 8 steps to a power of two
        value = (value + high) - high
        if AS_VALUES:
            value *= known
        tl.store(result + where, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def scaled(product, row_scales, output_scales, bias, y, outputs_count, HAS_BIAS: tl.constexpr,
           OUTPUTS: tl.constexpr):
    """A product of codes times the scales of its row and of its outputs, and the bias."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < outputs_count
    where = row * outputs_count + n
    value = tl.load(product + where, mask=inside, other=0).to(tl.float32)
    value *= tl.load(row_scales + row)
    value *= tl.load(output_scales + n, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + where, value.to(y.dtype.element_ty), mask=inside)
# fmt: on
