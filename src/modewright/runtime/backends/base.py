# SPDX-License-Identifier: Apache-2.0
"""What a backend is: one way to multiply by a packed weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import PackedWeight

FEW_ROWS, SOME_ROWS, MORE_ROWS = 8, 32, 128
"""Where the choice may change: calls with as many rows, by these steps, are served alike."""


@dataclass(frozen=True)
class Case:
    """What is to be multiplied: all that the choice of a backend depends on.

    Attributes:
        spec: The weight.
        device: Where it is: ``cpu``, ``cuda`` ...
        dtype: Of the activations.
        act: How the scheme quantizes activations: ``None`` (not at all), ``int8_token`` or
            ``fp8_token`` (a scale for each row, as it comes), ``int8_tensor`` or ``fp8_tensor``
            (one calibrated scale).
        rows: Rows of activations in one call.
    """

    spec: PackedSpec
    device: str
    dtype: torch.dtype
    act: str | None
    rows: int


class Backend(ABC):
    """One way to multiply by a packed weight.

    Attributes:
        name: What it is called in tables and on the command line.
        summary: How it works, in a line.
        needs: What it needs, for people.
        accuracy: Largest relative error of the output (Frobenius norm, ordinary data) against
            dequantizing the weight, quantizing the activations as the scheme says, and multiplying
            in float32. With bfloat16 activations, rounding of the output to bfloat16 comes on top.
        copies: Whether it keeps a second copy of the weight in an order of its own.
        differentiable: Whether gradients flow to the activations.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str]
    accuracy: ClassVar[float]
    copies: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False

    @abstractmethod
    def refuses(self, case: Case) -> str | None:
        """Return why this backend cannot (or should not) serve a case; ``None`` if it can."""

    def prepare(self, weight: PackedWeight) -> Any:
        """Return what :meth:`linear` needs of a weight; it is kept as long as the weight is.

        It must hold no reference to ``weight`` itself, only to its tensors.
        """
        raise NotImplementedError

    @abstractmethod
    def linear(
        self,
        x: torch.Tensor,
        prepared: Any,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return ``x @ weight.T + bias``: ``[..., K]`` -> ``[..., N]`` in the dtype of ``x``."""

    def extra_bytes(self, prepared: Any) -> int:
        """Return the memory that a prepared weight takes besides the packed one."""
        return 0


def cpu_problem(case: Case) -> str | None:
    """Return why torch's CPU kernels do not serve a case, or ``None``."""
    if case.device != "cpu":
        return f"it runs on the CPU, not on {case.device}"
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {case.dtype}"
    return None


def fitting(result: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return a product ``[rows, N]`` with its bias, in the shape and dtype that ``x`` asks for."""
    if bias is not None:
        result = result + bias
    return result.to(x.dtype).reshape(*x.shape[:-1], result.shape[-1])


def short(spec: PackedSpec) -> str:
    """Return a spec in a few words, such as ``int4 group 64``."""
    size = spec.group_size or spec.block_size
    parts = [spec.format, spec.granularity, *([str(size)] * (size is not None))]
    if spec.scale_format != "fp32":
        parts.append(f"with {spec.scale_format} scales")
    return " ".join(parts)
