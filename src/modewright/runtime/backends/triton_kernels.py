# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that multiply by packed weights: codes become numbers in registers.

Weights are read as words of 32 bits. What takes time is not memory but arithmetic, so a code is not
converted to a number: its bits are put where a float has its mantissa (and exponent), and the
scales make up for the power of two that it is off by. Imported only where Triton is; with
``TRITON_INTERPRET=1`` the kernels run on a CPU, slowly, for tests.

Constants that all kernels take:

- ``KIND``: ``integer``; ``float``, with ``MANTISSA`` bits of it, and ``FACTOR``, a power of two
  that the numbers are multiplied with; or ``table``, for others, whose numbers are looked up.
- ``BITS`` of a code. ``SCALE``: ``plain``, ``e8m0`` or ``e4m3``, both of these as bytes.
- ``RUN``: neighbouring columns that certainly share a scale. ``EVEN``: No tile is cut off.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _field(
    words,
    table,
    FIELD: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Return the numbers of one field of every word, float32.

    Those of ``in place`` integers are ``code * 2 ** (place - 149)``, without an exponent, where
    ``place`` is ``_place()`` of the field; those of other ``integer`` are ``1 + code / 2 ** BITS``.
    """
    CODES: tl.constexpr = (1 << BITS) - 1
    if KIND == "in place":
        SHIFT: tl.constexpr = 0 if (FIELD + 1) * BITS <= 23 else 16
        PLACE: tl.constexpr = FIELD * BITS - SHIFT
        return ((words >> SHIFT) & (CODES << PLACE)).to(tl.float32, bitcast=True)
    if KIND == "table":
        return tl.load(table + ((words >> (FIELD * BITS)) & CODES))
    TOP: tl.constexpr = 23 - BITS if KIND == "integer" else 23 - MANTISSA
    RIGHT: tl.constexpr = FIELD * BITS - TOP
    moved = words >> RIGHT if RIGHT > 0 else words << -RIGHT
    if KIND == "integer":
        return ((moved & (CODES << TOP)) | 0x3F800000).to(tl.float32, bitcast=True)
    sign = (words << (32 - BITS - FIELD * BITS)) & -2147483648
    number = sign | (moved & ((CODES >> 1) << TOP))
    return number.to(tl.float32, bitcast=True) * FACTOR


@triton.jit
def _place(column, BITS: tl.constexpr):
    """Return at which bit a code is that ``_field()`` left in place."""
    at = (column % (32 // BITS)) * BITS
    return tl.where(at + BITS <= 23, at, at - 16)


# fmt: off
@triton.jit
def _two(words, table, AT: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
         BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr):
    return tl.join(_field(words, table, AT, KIND, BITS, MANTISSA, FACTOR),
                   _field(words, table, AT + STEP, KIND, BITS, MANTISSA, FACTOR))


@triton.jit
def _four(words, table, AT: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
          BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr):
    return tl.join(_two(words, table, AT, 2 * STEP, KIND, BITS, MANTISSA, FACTOR),
                   _two(words, table, AT + STEP, 2 * STEP, KIND, BITS, MANTISSA, FACTOR))


@triton.jit
def _eight(words, table, AT: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr,
           BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr):
    return tl.join(_four(words, table, AT, 2 * STEP, KIND, BITS, MANTISSA, FACTOR),
                   _four(words, table, AT + STEP, 2 * STEP, KIND, BITS, MANTISSA, FACTOR))


@triton.jit
def _numbers(packed, table, n, is_output, start, words_stride, KIND: tl.constexpr,
             BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr,
             RUN: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Read a tile of a weight: its numbers in order, ``[OUTPUTS, COLUMNS / RUN, RUN]`` float32."""
    at = start // (32 // BITS) + tl.arange(0, COLUMNS // (32 // BITS))
    where = packed + n[:, None].to(tl.int64) * words_stride + at[None, :]
    if EVEN:
        words = tl.load(where)
    else:
        words = tl.load(where, mask=is_output[:, None] & (at[None, :] < words_stride), other=0)
    if BITS == 8:
        numbers = _four(words, table, 0, 1, KIND, BITS, MANTISSA, FACTOR)
    elif BITS == 4:
        numbers = _eight(words, table, 0, 1, KIND, BITS, MANTISSA, FACTOR)
    else:
        numbers = tl.join(_eight(words, table, 0, 2, KIND, BITS, MANTISSA, FACTOR),
                          _eight(words, table, 1, 2, KIND, BITS, MANTISSA, FACTOR))
    return numbers.reshape(OUTPUTS, COLUMNS // RUN, RUN)


@triton.jit
def _scales(scale, zeros, n, is_output, start, columns_count, scale_stride, zeros_stride,
            rows_per_scale, group, BITS: tl.constexpr, SCALE: tl.constexpr,
            HAS_ZEROS: tl.constexpr, RUN: tl.constexpr, COLUMNS: tl.constexpr):
    """Return scales and zero points of a tile, ``[OUTPUTS, COLUMNS / RUN]`` float32."""
    row = n // rows_per_scale
    first = start + RUN * tl.arange(0, COLUMNS // RUN)
    place = first // group
    known = is_output[:, None] & (first < columns_count)[None, :]
    raw = tl.load(scale + row[:, None] * scale_stride + place[None, :], mask=known, other=0)
    if SCALE == "e8m0":
        bits = raw.to(tl.int32)
        factor = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        bits = raw.to(tl.int32) << 20
        factor = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    else:
        factor = raw.to(tl.float32)
    if HAS_ZEROS:
        bit = place * BITS
        where = zeros + row[:, None] * zeros_stride + (bit // 8)[None, :]
        byte = tl.load(where, mask=known, other=0).to(tl.int32)
        zero = ((byte >> (bit % 8)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
    else:
        zero = tl.full(factor.shape, 1 << (BITS - 1), tl.float32)
    return factor, zero


@triton.jit
def _weights(packed, scale, zeros, table, n, is_output, start, columns_count, words_stride,
             scale_stride, zeros_stride, rows_per_scale, group, KIND: tl.constexpr,
             BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr,
             SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
             OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a tile of what a weight stands for, ``[OUTPUTS, COLUMNS]`` float32."""
    numbers = _numbers(packed, table, n, is_output, start, words_stride,
                       KIND, BITS, MANTISSA, FACTOR, RUN, EVEN, OUTPUTS, COLUMNS)
    factor, zero = _scales(scale, zeros, n, is_output, start, columns_count, scale_stride,
                           zeros_stride, rows_per_scale, group, BITS, SCALE, HAS_ZEROS, RUN,
                           COLUMNS)
    if KIND == "integer":
        shift = factor * (zero + (1 << BITS))
        values = numbers * (factor * (1 << BITS))[:, :, None] - shift[:, :, None]
    else:
        values = numbers * factor[:, :, None]
    return values.reshape(OUTPUTS, COLUMNS)


@triton.jit
def one_row(x, packed, scale, zeros, table, level, bias, y, outputs_count, columns_count,
            words_stride, scale_stride, zeros_stride, rows_per_scale, group, KIND: tl.constexpr,
            BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr,
            SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
            OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
            HAS_LEVEL: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One row of x times some outputs. The numbers of a run are summed before they are scaled."""
    INNER: tl.constexpr = "in place" if KIND == "integer" else KIND
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1)
    is_output = n < outputs_count
    total = tl.zeros([OUTPUTS, COLUMNS // RUN], tl.float32)
    for start in range(0, columns_count, COLUMNS):
        numbers = _numbers(packed, table, n, is_output, start, words_stride,
                           INNER, BITS, MANTISSA, FACTOR, RUN, EVEN, OUTPUTS, COLUMNS)
        factor, zero = _scales(scale, zeros, n, is_output, start, columns_count, scale_stride,
                               zeros_stride, rows_per_scale, group, BITS, SCALE, HAS_ZEROS, RUN,
                               COLUMNS)
        column = start + tl.arange(0, COLUMNS)
        if EVEN:
            seen = tl.load(x + row * columns_count + column).to(tl.float32)
        else:
            where = x + row * columns_count + column
            seen = tl.load(where, mask=column < columns_count, other=0.0).to(tl.float32)
        if KIND == "integer":  # 2 ** 64 keeps products from vanishing, 2 ** 85 makes up for both
            power = (127 + 64 - _place(column, BITS)) << 23
            raised = seen * power.to(tl.float32, bitcast=True)
            part = tl.sum(numbers * raised.reshape(COLUMNS // RUN, RUN)[None, :, :], axis=2)
            whole = tl.sum(seen.reshape(COLUMNS // RUN, RUN), axis=1)
            total += factor * (part * 3.8685626227668134e25 - zero * whole[None, :])
        else:
            part = tl.sum(numbers * seen.reshape(COLUMNS // RUN, RUN)[None, :, :], axis=2)
            total += factor * part
    result = tl.sum(total, axis=1)
    if HAS_LEVEL:
        result *= tl.load(level)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)
    tl.store(y + row * outputs_count + n, result.to(y.dtype.element_ty), mask=is_output)


@triton.jit
def some_rows(x, packed, scale, zeros, table, level, bias, y, rows_count, columns_each,
              outputs_count, columns_count, words_stride, scale_stride, zeros_stride,
              rows_per_scale, group, KIND: tl.constexpr, BITS: tl.constexpr,
              MANTISSA: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr,
              HAS_ZEROS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
              OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
              HAS_LEVEL: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A tile of rows times a tile of outputs, by the tensor cores, over a part of the columns."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    is_output, is_row = n < outputs_count, m < rows_count
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    first = part * columns_each
    for start in range(first, min(first + columns_each, columns_count), COLUMNS):
        weights = _weights(packed, scale, zeros, table, n, is_output, start, columns_count,
                           words_stride, scale_stride, zeros_stride, rows_per_scale, group,
                           KIND, BITS, MANTISSA, FACTOR, SCALE, HAS_ZEROS, RUN, EVEN,
                           OUTPUTS, COLUMNS)
        column = start + tl.arange(0, COLUMNS)
        where = x + m[:, None].to(tl.int64) * columns_count + column[None, :]
        if EVEN:
            seen = tl.load(where, mask=is_row[:, None], other=0.0)
        else:
            seen = tl.load(where, mask=is_row[:, None] & (column < columns_count)[None, :],
                           other=0.0)
        # The weights come first: only so the tensor cores take them from registers.
        total = tl.dot(weights.to(seen.dtype), tl.trans(seen), total, input_precision="ieee")
    if HAS_LEVEL:
        total *= tl.load(level)
    result = tl.trans(total)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)[None, :]
    where = y + (part.to(tl.int64) * rows_count + m[:, None]) * outputs_count + n[None, :]
    tl.store(where, result.to(y.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def unpacked(packed, scale, zeros, table, level, y, outputs_count, columns_count, words_stride,
             scale_stride, zeros_stride, rows_per_scale, group, KIND: tl.constexpr,
             BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr,
             SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
             OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, HAS_LEVEL: tl.constexpr):
    """What a weight stands for, ``[outputs, columns]``."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    start = tl.program_id(1) * COLUMNS
    is_output = n < outputs_count
    values = _weights(packed, scale, zeros, table, n, is_output, start, columns_count,
                      words_stride, scale_stride, zeros_stride, rows_per_scale, group,
                      KIND, BITS, MANTISSA, FACTOR, SCALE, HAS_ZEROS, RUN, EVEN, OUTPUTS, COLUMNS)
    if HAS_LEVEL:
        values *= tl.load(level)
    column = start + tl.arange(0, COLUMNS)
    where = y + n[:, None].to(tl.int64) * columns_count + column[None, :]
    known = is_output[:, None] & (column < columns_count)[None, :]
    tl.store(where, values.to(y.dtype.element_ty), mask=known)
# fmt: on
