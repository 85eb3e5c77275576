# SPDX-License-Identifier: Apache-2.0
"""torch's own product of bfloat16 activations with int8 weights, for the CPU."""

from __future__ import annotations

from typing import Any

import torch

from modewright.runtime.backends.base import SOME_ROWS, Backend, Case, cpu_problem, fitting
from modewright.runtime.backends.int8_weight import Int8Weight, no_int8_weight
from modewright.runtime.packed_weight import PackedWeight


class Int8Pack(Backend):
    """``aten::_weight_int8pack_mm``: bfloat16 activations, a scale for each output."""

    name = "int8pack"
    summary = "torch's int8 product; signed weights, activations in bfloat16"
    needs = "int8 with a scale per channel, inputs a multiple of 16, up to 32 rows"
    accuracy = 1e-2
    copies = True

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        spec = case.spec
        if problem := no_int8_weight(spec):
            return problem
        if spec.shape[1] % 16 or 0 in spec.shape:  # the operator reads beyond the end otherwise
            return f"inputs are a multiple of 16; here {spec.shape[1]}"
        if case.act is not None:
            return "it leaves activations unquantized"
        if case.rows > SOME_ROWS:
            return f"with more than {SOME_ROWS} rows unpacking first is faster"
        return cpu_problem(case)

    def prepare(self, weight: PackedWeight) -> Int8Weight:  # noqa: D102
        return Int8Weight.of(weight, torch.bfloat16)

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: Int8Weight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        return fitting(torch.ops.aten._weight_int8pack_mm(rows, *prepared), x, bias)

    def extra_bytes(self, prepared: Any) -> int:  # noqa: D102
        return int(prepared.nbytes)
