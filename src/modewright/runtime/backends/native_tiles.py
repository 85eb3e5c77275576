# SPDX-License-Identifier: Apache-2.0
"""modewright's own kernel for many rows on CPUs whose tiles multiply bfloat16."""

from __future__ import annotations

from typing import cast

import torch

from modewright.errors import KernelError
from modewright.runtime.backends.activations import scale_of
from modewright.runtime.backends.base import (
    FEW_ROWS,
    MORE_ROWS,
    SOME_ROWS,
    Backend,
    Case,
    cpu_problem,
)
from modewright.runtime.backends.portable import simulated
from modewright.runtime.native.library import (
    BEST,
    DTYPES,
    ROUNDINGS,
    Library,
    NativeWeight,
    format_problem,
    library,
    tiles_problem,
)
from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import PackedWeight

_LONG, _WIDE = 128, 1024  # inputs of a group, and of all, from which int8 products are faster
_SHORT = 64  # inputs of a group, below which they are slow
_NOT_FINITE = 1  # what the library says of numbers that cannot be rounded
_LOOKED_UP = 6  # bits of a code, up to which unpacking is a look-up, and fast if inputs are many


class NativeTiles(Backend):
    """Weights become bfloat16 in the cache, a few outputs at a time, and meet all rows there.

    What is multiplied faster in int8 is left to
    :class:`~modewright.runtime.backends.native.Native`: few rows, and long groups, whose sums are
    scaled seldom. Activations that are quantized, too, are rounded to what their format leaves.
    """

    name = "native-tiles"
    summary = "own kernel: packed codes become bfloat16 in the cache, tiles multiply them"
    needs = "AMX; tens of rows; a C++ compiler at first use, or a wheel"
    accuracy = 1e-2

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        problem = cpu_problem(case) or tiles_problem(case.spec)
        if problem is not None:
            return problem
        found = library()
        if isinstance(found, str):
            return found
        if not found.has_tiles:
            return "this CPU has no AMX"
        least = least_rows(case.spec)
        if case.rows <= least:
            return f"it is for more than {least} rows"
        if format_problem(case.spec) is None and _has_long_groups(case.spec, case.act):
            return f"groups of {case.spec.tile[1]} are multiplied faster in int8"
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
        return multiply_in_tiles(x, prepared, bias, act, act_scale)


def multiply_in_tiles(
    x: torch.Tensor,
    prepared: NativeWeight,
    bias: torch.Tensor | None,
    act: str | None,
    act_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` with both as bfloat16, ``x`` quantized first.

    Raises:
        KernelError: Memory ran out.
    """
    kind, to = DTYPES.get(x.dtype), ROUNDINGS.get(act)
    if kind is None:
        return multiply_in_tiles(x.float(), prepared, bias, act, act_scale).to(x.dtype)
    if to is None:
        return multiply_in_tiles(simulated(x, act, act_scale), prepared, bias, None, None)
    x = x.contiguous()
    result = x.new_empty(*x.shape[:-1], prepared.rows)
    added = None if bias is None else bias.float().contiguous()
    prepared.update()
    failed = prepared.kernels.tiles_linear(
        prepared.address,
        x.data_ptr(),
        x.numel() // prepared.columns,
        None if added is None else added.data_ptr(),
        result.data_ptr(),
        scale_of(act_scale),
        kind | to << 2 | BEST << 7 | torch.get_num_threads() << 9,
    )
    if failed == _NOT_FINITE:
        return multiply_in_tiles(simulated(x, act, act_scale), prepared, bias, None, None)
    if failed:
        raise KernelError("the kernel cannot multiply by this weight: memory ran out.")
    return result


def least_rows(spec: PackedSpec) -> int:
    """Return up to how many rows another kernel is faster."""
    if format_problem(spec) is not None:
        return FEW_ROWS
    unpacks_fast = spec.num_bits <= _LOOKED_UP or spec.shape[1] < _WIDE
    return SOME_ROWS if spec.tile[1] < _SHORT or unpacks_fast else MORE_ROWS


def _has_long_groups(spec: PackedSpec, act: str | None) -> bool:
    exact = act is not None and act.startswith("int8")
    wide = spec.shape[1] >= _WIDE and not spec.has_zero_point
    return spec.tile[1] >= _LONG and (exact or wide)
