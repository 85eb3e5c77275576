# SPDX-License-Identifier: Apache-2.0
"""torch's product of two int8 matrices, for GPUs."""

from __future__ import annotations

from typing import Any

import torch

from modewright.runtime.activations import INT8_TENSOR, INT8_TOKEN
from modewright.runtime.backends.activations import int8_codes
from modewright.runtime.backends.base import Backend, Case, fitting
from modewright.runtime.backends.gpu_rows import has_kernels, quantize_rows, scale_product
from modewright.runtime.backends.int8_weight import Int8Weight, no_int8_weight
from modewright.runtime.packed_weight import PackedWeight

_FEWEST_ROWS = 17  # cuBLASLt refuses fewer


class IntMm(Backend):
    """``torch._int_mm``, for many rows on a GPU."""

    name = "int-mm"
    summary = "torch's int8 product on a GPU; signed weights"
    needs = "int8 with a scale per channel, int8 activations, a GPU, sizes a multiple of 8"
    accuracy = 1e-5
    copies = True

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        spec = case.spec
        if case.device != "cuda":
            return f"it runs on a GPU, not on {case.device}"
        if problem := no_int8_weight(spec):
            return problem
        if case.act not in (INT8_TOKEN, INT8_TENSOR):
            return "it needs int8 activations"
        if spec.shape[0] % 8 or spec.shape[1] % 8 or 0 in spec.shape:
            return f"sizes are multiples of 8; here {list(spec.shape)}"
        if case.rows < _FEWEST_ROWS:
            return f"it needs {_FEWEST_ROWS} rows"
        return None

    def prepare(self, weight: PackedWeight) -> Int8Weight:  # noqa: D102
        return Int8Weight.of(weight)

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: Int8Weight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        on_gpu = has_kernels(x.device.type)
        quantize = quantize_rows if on_gpu else int8_codes
        codes, scale = quantize(rows.contiguous(), act or INT8_TOKEN, act_scale)
        missing = _FEWEST_ROWS - len(codes)
        if missing > 0:  # chosen for many rows, called with the last few of a data set
            codes = torch.cat([codes, codes.new_zeros(missing, codes.shape[1])])
        product = torch._int_mm(codes.to(torch.int8), prepared.codes.t())[: len(scale)]
        if on_gpu:
            result = scale_product(product, scale, prepared.scale, bias, x.dtype)
            return result.reshape(*x.shape[:-1], result.shape[-1])
        return fitting(product.float() * scale * prepared.scale, x, bias)

    def extra_bytes(self, prepared: Any) -> int:  # noqa: D102
        return int(prepared.nbytes)
