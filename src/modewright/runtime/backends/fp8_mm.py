# SPDX-License-Identifier: Apache-2.0
"""torch's product of two fp8 matrices, for GPUs that multiply fp8."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from modewright.runtime.activations import FP8_TENSOR, FP8_TOKEN
from modewright.runtime.backends.base import Backend, Case, short
from modewright.runtime.backends.gpu_rows import has_kernels, quantize_rows
from modewright.runtime.packed_weight import PackedWeight

_FEWEST_ROWS = 3  # fewer are multiplied faster one by one
_CAPABILITY = (8, 9)


class Fp8Weight(NamedTuple):
    """The packed codes as fp8 numbers, ``[N, K]``, and scales ``[1, N]`` float32."""

    codes: torch.Tensor
    scale: torch.Tensor


class Fp8Mm(Backend):
    """``torch._scaled_mm`` with a scale for each row and each output."""

    name = "fp8-mm"
    summary = "torch's fp8 product on a GPU; the weight as it is packed"
    needs = "fp8_e4m3 with a scale per channel, fp8 activations, a GPU that multiplies fp8, triton"
    accuracy = 1e-2

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        spec = case.spec
        if case.device != "cuda":
            return f"it runs on a GPU, not on {case.device}"
        if (spec.format, spec.granularity, spec.scale_format) != ("fp8_e4m3", "channel", "fp32"):
            return f"it multiplies by fp8_e4m3 with a scale per channel, not {short(spec)}"
        if case.act not in (FP8_TOKEN, FP8_TENSOR):
            return "it needs fp8 activations"
        if spec.shape[0] % 16 or spec.shape[1] % 16 or 0 in spec.shape:
            return f"sizes are multiples of 16; here {list(spec.shape)}"
        if case.rows < _FEWEST_ROWS:
            return f"it is for {_FEWEST_ROWS} rows or more"
        if not has_kernels(case.device):
            return "the package triton is not installed"
        return _gpu_problem()

    def prepare(self, weight: PackedWeight) -> Fp8Weight:  # noqa: D102
        scale = weight.effective_scale().reshape(1, -1).contiguous()
        return Fp8Weight(weight.packed.view(torch.float8_e4m3fn), scale)

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: Fp8Weight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        outputs, columns = prepared.codes.shape
        rows = x.reshape(-1, columns).contiguous()
        codes, scale = quantize_rows(rows, act or FP8_TOKEN, act_scale)
        result = torch._scaled_mm(
            codes,
            prepared.codes.t(),
            scale_a=scale,
            scale_b=prepared.scale,
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
        )
        return result.to(x.dtype).reshape(*x.shape[:-1], outputs)

    def extra_bytes(self, prepared: Fp8Weight) -> int:  # noqa: D102
        return prepared.scale.nbytes


@cache
def _gpu_problem() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    found = torch.cuda.get_device_capability()
    if torch.version.hip is None and found < _CAPABILITY:
        return f"the GPU does not multiply fp8: its capability is {found[0]}.{found[1]}"
    return None
