# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that multiply by packed weights: codes are unpacked on the way into registers.

A byte holds ``FIELDS`` codes. All codes of one field are taken together, and meet every
``FIELDS``-th input from that field's on, so that nothing has to be interleaved. Imported only where
Triton is; with ``TRITON_INTERPRET=1`` the kernels run on a CPU, slowly, for tests.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _values(
    codes,
    columns,
    outputs,
    inside,
    scale,
    scale_stride,
    rows_per_scale,
    group,
    zeros,
    zeros_stride,
    table,
    OFFSET: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """Return what codes stand for, float32; they belong to the given outputs and columns."""
    row, place = outputs // rows_per_scale, columns // group
    factor = tl.load(scale + row * scale_stride + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_TABLE:
        numbers = tl.load(table + codes, mask=inside, other=0.0)
    elif HAS_ZEROS:
        bit = place * BITS
        byte = tl.load(zeros + row * zeros_stride + bit // 8, mask=inside, other=0).to(tl.int32)
        point = (byte >> (bit % 8)) & ((1 << BITS) - 1)
        numbers = (codes - point).to(tl.float32)
    else:
        numbers = (codes - OFFSET).to(tl.float32)
    return numbers * factor


@triton.jit
def few_rows(
    x,
    packed,
    scale,
    zeros,
    table,
    bias,
    y,
    outputs_count,
    columns_count,
    packed_stride,
    scale_stride,
    zeros_stride,
    rows_per_scale,
    group,
    OFFSET: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One row of x times some outputs: each program reads every byte of its outputs once."""
    FIELDS: tl.constexpr = 8 // BITS
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1)
    is_output = n < outputs_count
    total = tl.zeros([OUTPUTS], tl.float32)
    for start in range(0, packed_stride, BYTES):
        at = start + tl.arange(0, BYTES)
        readable = is_output[:, None] & (at[None, :] < packed_stride)
        where = packed + n[:, None].to(tl.int64) * packed_stride + at[None, :]
        raw = tl.load(where, mask=readable, other=0).to(tl.int32)
        for field in tl.static_range(FIELDS):
            column = at * FIELDS + field
            known = column < columns_count
            inside = readable & known[None, :]
            codes = (raw >> (field * BITS)) & ((1 << BITS) - 1)
            # fmt: off
            weight = _values(
                codes, column[None, :], n[:, None], inside,
                scale, scale_stride, rows_per_scale, group, zeros, zeros_stride, table,
                OFFSET, BITS, HAS_ZEROS, HAS_TABLE,
            )
            # fmt: on
            seen = tl.load(x + row * columns_count + column, mask=known, other=0.0)
            total += tl.sum(weight * seen.to(tl.float32)[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)
    tl.store(y + row * outputs_count + n, total.to(y.dtype.element_ty), mask=is_output)


@triton.jit
def many_rows(
    x,
    packed,
    scale,
    zeros,
    table,
    bias,
    y,
    rows_count,
    outputs_count,
    columns_count,
    packed_stride,
    scale_stride,
    zeros_stride,
    rows_per_scale,
    group,
    OFFSET: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """A tile of rows times a tile of outputs, by the tensor cores."""
    FIELDS: tl.constexpr = 8 // BITS
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = m < rows_count, n < outputs_count
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, packed_stride, BYTES):
        at = start + tl.arange(0, BYTES)
        readable = is_output[None, :] & (at[:, None] < packed_stride)
        where = packed + n[None, :].to(tl.int64) * packed_stride + at[:, None]
        raw = tl.load(where, mask=readable, other=0).to(tl.int32)
        for field in tl.static_range(FIELDS):
            column = at * FIELDS + field
            known = column < columns_count
            inside = readable & known[:, None]
            codes = (raw >> (field * BITS)) & ((1 << BITS) - 1)
            # fmt: off
            weight = _values(
                codes, column[:, None], n[None, :], inside,
                scale, scale_stride, rows_per_scale, group, zeros, zeros_stride, table,
                OFFSET, BITS, HAS_ZEROS, HAS_TABLE,
            )
            # fmt: on
            place = x + m[:, None].to(tl.int64) * columns_count + column[None, :]
            seen = tl.load(place, mask=is_row[:, None] & known[None, :], other=0.0)
            total += tl.dot(seen, weight.to(seen.dtype), input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)[None, :]
    place = y + m[:, None].to(tl.int64) * outputs_count + n[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])
