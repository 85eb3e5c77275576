# SPDX-License-Identifier: Apache-2.0
"""oneDNN's int8 x int8 product, as torch's x86 quantization uses it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from modewright.runtime.backends.activations import int8_codes
from modewright.runtime.backends.base import Backend, Case, cpu_problem, fitting
from modewright.runtime.backends.int8_weight import no_int8_weight
from modewright.runtime.packed_weight import PackedWeight

_ZERO = 128


class OneDnnWeight(NamedTuple):
    """What the operator takes."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


class OneDnnInt8(Backend):
    """``onednn::qlinear_pointwise``.

    The operator is fast with unsigned activations alone, and has one scale for all of them: int8
    codes become ``code + 128`` with zero point 128 and scale 1, and the scales of the rows are
    multiplied on afterwards, which is exact.
    """

    name = "onednn-int8"
    summary = "oneDNN's int8 product; weights in an order of its own"
    needs = "int8 with a scale per channel, int8 activations, a CPU with VNNI"
    accuracy = 1e-5
    copies = True

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        spec = case.spec
        if problem := no_int8_weight(spec):
            return problem
        if case.act not in ("int8_token", "int8_tensor"):
            return "it needs int8 activations"
        if 0 in spec.shape:
            return "the weight is empty"
        if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return "this torch was built without oneDNN"
        if not torch.cpu._is_vnni_supported():
            return "this CPU has no VNNI: sums would overflow"
        return cpu_problem(case)

    def prepare(self, weight: PackedWeight) -> OneDnnWeight:  # noqa: D102
        codes = weight.codes().view(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        scale = weight.effective_scale().flatten().contiguous()
        return OneDnnWeight(packed, scale, torch.zeros(len(scale), dtype=torch.int64))

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: OneDnnWeight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        if not x.numel():
            return fitting(x.new_zeros(0, len(prepared.scale)), x, bias)
        codes, scale = int8_codes(x.reshape(-1, x.shape[-1]), act, act_scale)
        shifted = codes.add_(_ZERO).to(torch.uint8)
        result = torch.ops.onednn.qlinear_pointwise(
            *(shifted, 1.0, _ZERO, *prepared, None, 1.0, 0, torch.float32, "none", [], "")
        )
        return fitting(result * scale, x, bias)

    def extra_bytes(self, prepared: Any) -> int:  # noqa: D102
        return int(prepared.scale.numel() * 12 + prepared.packed.numel())
