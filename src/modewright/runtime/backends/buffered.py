# SPDX-License-Identifier: Apache-2.0
"""Unpack into one buffer that all weights share, then multiply: for many rows.

What makes a dense product of a packed weight slow is not the unpacking but new memory for its
result, which has to be mapped each time. One buffer, as large as the largest weight, is kept for
each thread. Unpacking looks bytes up in a table of the values of their codes.
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


class BufferedWeight(NamedTuple):
    """The packed weight, and the effective scales by which numbers are multiplied."""

    weight: PackedWeight
    scale: torch.Tensor


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
        return BufferedWeight(weight.map(lambda tensor: tensor), weight.effective_scale())

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: BufferedWeight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = simulated(x, act, act_scale).reshape(-1, x.shape[-1])
        dtype = torch.bfloat16 if _fast_bfloat16() else torch.float32
        weight = _buffer(prepared.weight.spec.shape, dtype)
        unpack_into(weight, prepared)
        return fitting(F.linear(rows.to(dtype), weight), x, bias)

    def extra_bytes(self, prepared: BufferedWeight) -> int:  # noqa: D102
        return prepared.scale.nbytes


def unpack_into(out: torch.Tensor, prepared: BufferedWeight) -> None:
    """Write what a packed weight stands for into ``out``, ``[N, K]``, in the dtype of ``out``."""
    weight, scale = prepared
    spec = weight.spec
    rows, columns = spec.shape
    table = _byte_values(spec.format, spec.code_offset)
    zeros = weight.zero_points()
    scale = scale.expand(rows, -1)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        values = table.index_select(0, weight.packed[part].flatten().int())
        grouped = values.view(part.stop - first, scale.shape[1], -1)
        if zeros is not None:
            grouped.sub_(zeros[part].unsqueeze(-1))
        grouped.mul_(scale[part].unsqueeze(-1))
        out[part] = grouped.view(part.stop - first, columns)


@cache
def _byte_values(name: str, offset: int) -> torch.Tensor:
    """Return the numbers whose codes lie in each byte, ``[256, 8 / num_bits]`` float32."""
    fmt = format_named(name)
    values = torch.tensor(code_values(fmt), dtype=torch.float32)
    codes = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, fmt.num_bits)
    return values[(codes & ((1 << fmt.num_bits) - 1)) ^ offset].contiguous()


_kept = threading.local()


def _buffer(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    size = shape[0] * shape[1]
    kept: torch.Tensor | None = getattr(_kept, "memory", None)
    if kept is None or kept.numel() < size or kept.dtype != dtype:
        kept = _kept.memory = torch.empty(size, dtype=dtype)
    return kept[:size].view(shape)


@cache
def _fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
