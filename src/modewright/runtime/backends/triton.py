# SPDX-License-Identifier: Apache-2.0
"""modewright's kernels for GPUs: codes are unpacked in registers, written in Triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from modewright.formats.catalogue import code_values
from modewright.formats.integer import IntegerFormat
from modewright.runtime.backends.base import Backend, Case
from modewright.runtime.backends.portable import simulated
from modewright.runtime.packed_weight import PackedWeight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FEW = 8  # rows that are multiplied one by one: each reads the weight, which a cache may hold
_OUTPUTS, _BYTES = 16, 128  # of a program for one row
_TILE = {"ROWS": 32, "OUTPUTS": 64, "BYTES": 32}  # of a program for many


class TritonWeight(NamedTuple):
    """A packed weight as the kernels read it."""

    packed: torch.Tensor
    scale: torch.Tensor  # float32 or float16
    zero_point: torch.Tensor | None
    table: torch.Tensor | None  # float32: the numbers of all codes
    shape: tuple[int, int]
    tile: tuple[int, int]
    num_bits: int
    extra_bytes: int


class Triton(Backend):
    """Products of packed weights with activations in 16 or 32 bits.

    With ``TRITON_INTERPRET=1`` in the environment they run on a CPU as well, to be tested.
    """

    name = "triton"
    summary = "own kernels in Triton: codes are unpacked in registers, then multiplied as floats"
    needs = "a GPU and the package triton; codes of 2, 4 or 8 bits"
    accuracy = 1e-2

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        if case.device != "cuda" and not (case.device == "cpu" and _is_interpreted()):
            return f"it runs on a GPU, not on {case.device}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if case.dtype not in _DTYPES:
            return f"it takes float16, bfloat16 and float32, not {case.dtype}"
        if case.spec.num_bits not in (2, 4, 8):
            return f"codes have 2, 4 or 8 bits; here {case.spec.num_bits}"
        return "the weight is empty" if 0 in case.spec.shape else None

    def prepare(self, weight: PackedWeight) -> TritonWeight:  # noqa: D102
        spec, scale = weight.spec, weight.scale
        if scale.dtype not in (torch.float16, torch.float32) or weight.global_scale is not None:
            scale = weight.effective_scale().contiguous()
        table = None
        if not isinstance(spec.number_format, IntegerFormat):
            table = torch.tensor(code_values(spec.number_format), device=weight.device)
        made = (0 if scale is weight.scale else scale.nbytes) + (0 if table is None else 1024)
        return TritonWeight(
            packed=weight.packed,
            scale=scale,
            zero_point=weight.zero_point,
            table=table,
            shape=spec.shape,
            tile=spec.tile,
            num_bits=spec.num_bits,
            extra_bytes=made,
        )

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: TritonWeight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        outputs, columns = prepared.shape
        rows = simulated(x, act, act_scale).to(x.dtype).reshape(-1, columns).contiguous()
        result = x.new_empty(len(rows), outputs)
        if not len(rows):
            return result.reshape(*x.shape[:-1], outputs)
        kernels = _kernels()
        high, wide = prepared.tile
        nothing = prepared.scale  # stands for what is not read
        tensors = (
            *(rows, prepared.packed, prepared.scale),
            nothing if prepared.zero_point is None else prepared.zero_point,
            nothing if prepared.table is None else prepared.table,
            nothing if bias is None else bias.contiguous(),
            result,
        )
        sizes = (
            *(outputs, columns, prepared.packed.shape[1], prepared.scale.shape[1]),
            0 if prepared.zero_point is None else prepared.zero_point.shape[1],
            *(high, wide),
        )
        kinds = {
            "OFFSET": 1 << (prepared.num_bits - 1),
            "BITS": prepared.num_bits,
            "HAS_ZEROS": prepared.zero_point is not None,
            "HAS_TABLE": prepared.table is not None,
            "HAS_BIAS": bias is not None,
        }
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            if len(rows) <= _FEW:
                grid = (-(-outputs // _OUTPUTS), len(rows))
                kernels.few_rows[grid](*tensors, *sizes, **kinds, OUTPUTS=_OUTPUTS, BYTES=_BYTES)
            else:
                grid = (-(-outputs // _TILE["OUTPUTS"]), -(-len(rows) // _TILE["ROWS"]))
                kernels.many_rows[grid](*tensors, len(rows), *sizes, **kinds, **_TILE)
        return result.reshape(*x.shape[:-1], outputs)

    def extra_bytes(self, prepared: TritonWeight) -> int:  # noqa: D102
        return prepared.extra_bytes


@cache
def _kernels() -> Any:
    return importlib.import_module("modewright.runtime.backends.triton_kernels")


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
