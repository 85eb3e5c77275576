# SPDX-License-Identifier: Apache-2.0
"""Unpack into one buffer that all weights share, then multiply: for many rows.

What makes a dense product of a packed weight slow is not the unpacking but new memory for its
result, which has to be mapped each time. One buffer, as large as the largest weight, is kept for
each thread. Codes of 8 bits are cast, fp8 by way of float16; for others, bytes are looked up in a
table of the values of their codes. Scales of whole channels are applied to the output.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.formats.catalogue import code_values, format_named
from modewright.runtime.backends.base import Backend, Case, cpu_problem, fitting, short
from modewright.runtime.backends.portable import simulated
from modewright.runtime.packed_weight import PackedWeight

_CHUNK = 1 << 18  # values that are unpacked at a time: they stay in the cache
_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8}
# fp8 formats whose bits are those of a float16 number: (its shift, and what that number lacks)
_HALVES = {"fp8_e4m3": (7, 256.0), "fp8_e5m2": (8, 1.0)}
_FLOATS = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


class BufferedWeight(NamedTuple):
    """The packed weight, and the scales by which the numbers that come out are multiplied."""

    weight: PackedWeight
    scale: torch.Tensor
    by_table: bool


class Buffered(Backend):
    """Unpacks into a buffer; on CPUs that multiply bfloat16 fast it is of that dtype."""

    name = "buffered"
    summary = "unpack by tables into one kept buffer, then torch's dense product"
    needs = (
        "codes of 2, 4 or 8 bits with scales per tensor, channel or group that divides the inputs"
    )
    accuracy = 1e-2

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        spec = case.spec
        if spec.num_bits not in (2, 4, 8):
            return f"codes have 2, 4 or 8 bits; here {spec.num_bits}"
        if spec.granularity == "block" or spec.shape[1] % spec.tile[1] or 0 in spec.shape:
            return f"scales belong to groups that divide the inputs; here {short(spec)}"
        if spec.shape[1] * spec.num_bits % 8:
            return "rows are whole bytes"
        return cpu_problem(case)

    def prepare(self, weight: PackedWeight) -> BufferedWeight:  # noqa: D102
        scale, by_table = weight.effective_scale(), True
        kept = weight.map(lambda tensor: tensor)
        if weight.spec.format in _INTEGERS:
            by_table = False
        elif weight.spec.format in _HALVES and not _has_nan(weight):
            scale, by_table = scale * _HALVES[weight.spec.format][1], False
        return BufferedWeight(kept, scale, by_table)

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: BufferedWeight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = simulated(x, act, act_scale).reshape(-1, x.shape[-1])
        dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
        weight = kept_buffer(prepared.weight.spec.shape, dtype)
        after = scales_outputs(prepared.weight)
        unpack_into(weight, prepared, scaled=not after)
        result = F.linear(rows.to(dtype), weight)
        if after:
            result = result * prepared.scale.flatten()
        return fitting(result, x, bias)

    def extra_bytes(self, prepared: BufferedWeight) -> int:  # noqa: D102
        return prepared.scale.nbytes


def scales_outputs(weight: PackedWeight) -> bool:
    """Whether scales can be applied to the output: one in a row, and no zero points."""
    return weight.spec.granularity in ("tensor", "channel") and weight.zero_point is None


def unpack_into(out: torch.Tensor, prepared: BufferedWeight, *, scaled: bool = True) -> None:
    """Write what a packed weight stands for into ``out``, ``[N, K]``, in the dtype of ``out``.

    Args:
        out: The buffer.
        prepared: The weight.
        scaled: Whether numbers are multiplied with their scales.
    """
    weight, scale, by_table = prepared
    rows, columns = weight.spec.shape
    zeros = weight.zero_points()
    scale = scale.expand(rows, -1)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        numbers = _numbers(weight, part, by_table)
        if scaled:
            numbers = numbers.float().view(part.stop - first, scale.shape[1], -1)
            if zeros is not None:
                numbers.sub_(zeros[part].unsqueeze(-1))
            numbers.mul_(scale[part].unsqueeze(-1))
        out[part] = numbers.view(part.stop - first, columns)


def _numbers(weight: PackedWeight, part: slice, by_table: bool) -> torch.Tensor:
    """Return the numbers of some rows before scales and zero points."""
    spec, packed = weight.spec, weight.packed[part]
    if by_table:
        table = _byte_values(spec.format, spec.code_offset)
        return table.index_select(0, packed.flatten().int())
    if spec.format in _INTEGERS:
        codes = packed ^ spec.code_offset if spec.code_offset else packed
        return codes.view(_INTEGERS[spec.format])
    shift = _HALVES[spec.format][0]
    wide = packed.to(torch.int16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << shift).view(torch.float16)


def _has_nan(weight: PackedWeight) -> bool:
    codes = weight.packed.view(getattr(torch, _FLOATS[weight.spec.format]))
    return bool(codes.float().isnan().any())


@cache
def _byte_values(name: str, offset: int) -> torch.Tensor:
    """Return the numbers whose codes lie in each byte, ``[256, 8 / num_bits]`` float32."""
    fmt = format_named(name)
    values = torch.tensor(code_values(fmt), dtype=torch.float32)
    codes = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, fmt.num_bits)
    return values[(codes & ((1 << fmt.num_bits) - 1)) ^ offset].contiguous()


_kept = threading.local()


def kept_buffer(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return the memory that this thread unpacks weights into, ``shape``; values are left over."""
    size = shape[0] * shape[1]
    kept: torch.Tensor | None = getattr(_kept, "memory", None)
    if kept is None or kept.numel() < size or kept.dtype != dtype:
        kept = _kept.memory = torch.empty(size, dtype=dtype)
    return kept[:size].view(shape)


@cache
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
