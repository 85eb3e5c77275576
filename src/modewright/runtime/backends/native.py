# SPDX-License-Identifier: Apache-2.0
"""modewright's own kernel: reads the packed layout as it is, multiplies in int8."""

from __future__ import annotations

from typing import cast

import torch

from modewright.errors import ConfigError, KernelError
from modewright.runtime.backends.base import Backend, Case, cpu_problem
from modewright.runtime.backends.portable import simulated
from modewright.runtime.native.library import (
    ACTIVATIONS,
    BEST,
    DTYPES,
    ISAS,
    NO_BIAS,
    Library,
    NativeWeight,
    format_problem,
    library,
)
from modewright.runtime.packed_weight import PackedWeight

_TWO_TERMS = 1 << 6


class Native(Backend):
    """The kernel of :mod:`modewright.runtime.native`.

    Activations become int8: with a scale for up to 128 inputs where the scheme leaves them alone,
    as the scheme says otherwise. A row that holds a NaN or an infinity gives a row of NaN (with
    ``int8_tensor`` an infinity saturates, as it does in the scheme).

    Args:
        isa: The instruction set, for tests; the best one by default.
        terms: Into how many int8 numbers an activation is cut: 2 has an error of 1e-4.
    """

    name = "native"
    summary = "own kernel: int8 x packed codes, straight from the packed bytes"
    needs = "AVX2 or AVX-512 VNNI; a C++ compiler at first use, or a wheel with the library"
    accuracy = 2e-2

    def __init__(self, isa: str | None = None, terms: int = 1) -> None:
        self.isa = isa
        self.terms = terms
        self._place = BEST if isa is None else ISAS.index(isa)

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        problem = cpu_problem(case) or format_problem(case.spec)
        if problem is not None:
            return problem
        found = library()
        if isinstance(found, str):
            return found
        isa = self.isa or found.isas[-1]
        if isa not in found.isas:
            return f"this CPU has no {isa}"
        if self.isa is None and isa == "scalar":
            return "this CPU has neither AVX2 nor AVX-512 VNNI"
        if 0 in case.spec.shape:
            return "the weight is empty"
        act = case.act if case.act in ACTIVATIONS else None
        if not found.fits(case.spec, act, isa):
            return f"groups of {case.spec.tile[1]} do not fit registers of {isa}"
        return None

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
        if act not in ACTIVATIONS:
            x, act, act_scale = simulated(x, act, act_scale), None, None
        kind = DTYPES.get(x.dtype)
        if kind is None:
            return self.linear(x.float(), prepared, bias, act, act_scale).to(x.dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        result = x.new_empty(*x.shape[:-1], prepared.rows)
        options = kind | ACTIVATIONS[act] << 4 | self._place << 7 | torch.get_num_threads() << 9
        bias_at = 0
        if bias is None:
            options |= NO_BIAS << 2
        else:
            if bias.shape != (prepared.rows,) or not bias.is_cpu:
                raise ConfigError(
                    f"expected a bias [{prepared.rows}] on the CPU; received {list(bias.shape)} on "
                    f"{bias.device}."
                )
            if bias.dtype not in DTYPES or not bias.is_contiguous():
                bias = bias.float().contiguous()
            bias_at = bias.data_ptr()
            options |= DTYPES[bias.dtype] << 2
        if self.terms == 2 and act is None:
            options |= _TWO_TERMS
        prepared.update()
        failed = prepared.multiply(
            prepared.address,
            x.data_ptr(),
            x.numel() // prepared.columns,
            bias_at,
            result.data_ptr(),
            1.0 if act_scale is None else float(act_scale),
            options,
        )
        if failed:
            raise KernelError(
                "the kernel cannot multiply by this weight: "
                f"{'its groups do not fit' if failed == 1 else 'memory ran out'}. Set "
                "MODEWRIGHT_NATIVE=0 to go without it."
            )
        return result
