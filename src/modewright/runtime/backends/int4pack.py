# SPDX-License-Identifier: Apache-2.0
"""torch's own int4 matrix product for the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from modewright.runtime.backends.base import MORE_ROWS, Backend, Case, cpu_problem, fitting
from modewright.runtime.packed_weight import PackedWeight

_GROUPS = (32, 64, 128, 256)


class Int4Weight(NamedTuple):
    """What the operator takes."""

    packed: torch.Tensor
    group_size: int
    scales: torch.Tensor


class Int4Pack(Backend):
    """``aten::_weight_int4pack_mm_for_cpu``: bfloat16 activations, groups of 32 to 256.

    Only with bfloat16 is it vectorised, so activations are converted. It unpacks to floats for
    every row, so with many rows a dense product is faster.
    """

    name = "int4pack"
    summary = "torch's int4 product; weights in an order of its own, activations in bfloat16"
    needs = f"int4 or uint4 in groups of {_GROUPS}, outputs a multiple of 16, up to 128 rows"
    accuracy = 1e-2
    copies = True

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        spec = case.spec
        rows, columns = spec.shape
        if spec.format not in ("int4", "uint4") or spec.scale_format != "fp32":
            return f"it multiplies by int4 and uint4, not {spec.format}"
        if spec.group_size not in _GROUPS or columns % spec.group_size:
            return (
                f"groups are {_GROUPS} and divide the inputs; here {spec.group_size} of {columns}"
            )
        if rows % 16 or not rows or not columns:
            return f"outputs are a multiple of 16; here {rows}"
        if case.act is not None:
            return "it leaves activations unquantized"
        if case.rows > MORE_ROWS:
            return f"with more than {MORE_ROWS} rows unpacking first is faster"
        return cpu_problem(case)

    def prepare(self, weight: PackedWeight) -> Int4Weight:  # noqa: D102
        codes = (weight.codes() ^ weight.spec.code_offset).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale, zeros = weight.effective_scale(), weight.zero_points()
        shift = torch.zeros_like(scale) if zeros is None else (8 - zeros) * scale
        both = torch.stack([scale, shift], dim=-1).transpose(0, 1).to(torch.bfloat16)
        return Int4Weight(packed, weight.spec.tile[1], both.contiguous())

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: Int4Weight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, *prepared)
        return fitting(result, x, bias)

    def extra_bytes(self, prepared: Any) -> int:  # noqa: D102
        return int(prepared.packed.nbytes + prepared.scales.nbytes)
