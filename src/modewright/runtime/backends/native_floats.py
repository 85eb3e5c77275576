# SPDX-License-Identifier: Apache-2.0
"""modewright's own kernel for fp8 and nf4, and for what is unpacked before it is multiplied."""

from __future__ import annotations

from typing import cast

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.runtime.backends.activations import rounded
from modewright.runtime.backends.base import Backend, Case, cpu_problem, fitting
from modewright.runtime.backends.buffered import fast_bfloat16, kept_buffer
from modewright.runtime.backends.native_tiles import multiply_in_tiles
from modewright.runtime.native.library import (
    BEST,
    DTYPES,
    ISAS,
    Library,
    NativeWeight,
    float_problem,
    library,
)
from modewright.runtime.packed_weight import PackedWeight

_TOGETHER = 1 << 20  # values that are unpacked at a time: they stay in the cache
_BEYOND = 16  # floats after a row that the kernel may read


class NativeFloats(Backend):
    """Few rows are multiplied straight from the packed bytes; for many they are unpacked first.

    On CPUs with tiles some rows are multiplied there, as
    :class:`~modewright.runtime.backends.native_tiles.NativeTiles` does it.

    Args:
        isa: The instruction set, for tests; the best one by default.
    """

    name = "native-floats"
    summary = "own kernel: fp8 and nf4 as they are, times float32; unpacked first for many rows"
    needs = "a C++ compiler at first use, or a wheel with the library"
    accuracy = 1e-2
    few = 4
    """So many rows are multiplied without unpacking, and"""
    fewer = 2
    """so many on CPUs with tiles, in which more are multiplied."""

    def __init__(self, isa: str | None = None) -> None:
        self._isa = isa
        self._place = BEST if isa is None else ISAS.index(isa)

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        problem = cpu_problem(case) or float_problem(case.spec)
        if problem is not None:
            return problem
        found = library()
        if isinstance(found, str):
            return found
        if self._isa is not None and self._isa not in found.isas:
            return f"this CPU has no {self._isa}"
        return "the weight is empty" if 0 in case.spec.shape else None

    def prepare(self, weight: PackedWeight) -> NativeWeight:  # noqa: D102
        return NativeWeight(weight, cast(Library, library()))

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: NativeWeight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, prepared.columns)
        if len(rows) > self.fewer and prepared.in_tiles and self._isa is None:
            result = multiply_in_tiles(rows, prepared, bias, act, act_scale)
            return result.view(*x.shape[:-1], prepared.rows)
        rows = rounded(rows, act, act_scale)
        prepared.update()
        if len(rows) > self.few:
            return self._unpacked(rows, prepared, bias, x)
        padded = rows.new_zeros(len(rows), prepared.columns + _BEYOND, dtype=torch.float32)
        padded[:, : prepared.columns] = rows
        result = padded.new_empty(len(rows), prepared.rows)
        added = None if bias is None else bias.float().contiguous()
        prepared.kernels.float_linear(
            prepared.address,
            padded.data_ptr(),
            padded.shape[1],
            len(rows),
            None if added is None else added.data_ptr(),
            result.data_ptr(),
            self._place,
            torch.get_num_threads(),
        )
        return fitting(result, x, None)

    def _unpacked(
        self, rows: torch.Tensor, weight: NativeWeight, bias: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor:
        dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
        rows, kind, threads = rows.to(dtype), DTYPES[dtype], torch.get_num_threads()
        step = max(1, _TOGETHER // weight.columns)
        result = x.new_empty(len(rows), weight.rows)
        for first in range(0, weight.rows, step):
            last = min(first + step, weight.rows)
            dense = kept_buffer((last - first, weight.columns), dtype)
            weight.kernels.float_unpack(
                weight.address, dense.data_ptr(), kind, first, last, self._place, threads
            )
            result[:, first:last] = F.linear(rows, dense)
        return fitting(result, x, bias)
