# SPDX-License-Identifier: Apache-2.0
"""Which backend multiplies, and the product itself.

The choice depends on the weight's spec, the device, the dtype, how activations are quantized, and
on how many rows there are, from few (decoding) to many. It is made once for each weight and kept
with what the backend prepared.

Where something looks at the operations and not at the result, the portable backend serves, which
consists of torch's own: when a gradient is needed, while a model is traced or exported, and for
subclasses of tensors. ``torch.compile`` sees one operator of torch, which chooses when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from modewright.errors import ConfigError
from modewright.runtime.backends.base import (
    FEW_ROWS,
    MORE_ROWS,
    SOME_ROWS,
    Backend,
    Case,
)
from modewright.runtime.backends.measure import fastest
from modewright.runtime.backends.native import Native
from modewright.runtime.backends.operator import packed_linear, register
from modewright.runtime.backends.portable import portable_linear
from modewright.runtime.backends.table import backend_named, backends
from modewright.runtime.native.library import NativeWeight
from modewright.runtime.packed_weight import PackedWeight

SWITCH = "MODEWRIGHT_BACKENDS"
"""Set to ``measure``, backends are chosen by timing them on every new kind of weight."""

_Plan = tuple[Backend, Any, int | None]  # and the version of the packed tensor it was made for
_allowed: list[tuple[str, ...]] = []
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)  # since torch 2.7


def linear(
    weight: PackedWeight,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    act: str | None = None,
    act_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        weight: ``[N, K]``.
        x: ``[..., K]``, any float dtype, on the device of the weight.
        bias: ``[N]`` or ``None``.
        act: How activations are quantized first: ``None``, ``"int8_token"``, ``"int8_tensor"``,
            ``"fp8_token"`` or ``"fp8_tensor"``.
        act_scale: The scale of all activations, one float32; for those of a tensor.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ConfigError: Shapes or devices do not go together.
    """
    if type(x) is not torch.Tensor or (_needs_gradient(x, bias) and torch.is_grad_enabled()):
        return portable_linear(x, weight, bias, act, act_scale)
    if torch.compiler.is_compiling() and not _is_exporting():
        return packed_linear(weight, x, bias, act, act_scale)
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return portable_linear(x, weight, bias, act, act_scale)
    shape = x.shape
    columns = weight.spec.shape[1]
    if not shape or shape[-1] != columns:
        raise ConfigError(
            f"expected activations [..., {columns}] for {weight.spec}; received {list(shape)}."
        )
    count = x.numel()
    size = (count > FEW_ROWS * columns) + (count > SOME_ROWS * columns)
    size += count > MORE_ROWS * columns
    key = (x.dtype, x.is_cpu, act, size)
    plan: _Plan | None = weight.plans.get(key)
    if (
        plan is None
        or _allowed
        or (plan[2] is not None and plan[2] != weight.packed._version)  # written to in place
    ):
        plan = _new_plan(weight, x, act, key)
    return plan[0].linear(x, plan[1], bias, act, act_scale)


def native_plan(weight: PackedWeight, act: str | None, dtype: torch.dtype) -> NativeWeight | None:
    """Return a weight as modewright's own kernel has it, if that serves a few rows of a dtype.

    ``None`` too where that was not chosen yet, or something else was.
    """
    plan: _Plan | None = weight.plans.get((dtype, True, act, 0))
    if plan is None or type(plan[0]) is not Native or _allowed:
        return None
    fresh = plan[2] is None or plan[2] == weight.packed._version
    return cast(NativeWeight, plan[1]) if fresh else None


def choose(case: Case, *, copies: bool = True, measure: bool = False) -> Backend:
    """Return the first backend of the table that does not refuse a case, or the fastest one.

    Args:
        case: What is to be multiplied.
        copies: Whether backends may keep a second copy of the weight.
        measure: Time all that do not refuse on a weight of random numbers; the result is kept as
            long as the process runs.
    """
    names = _allowed[-1] if _allowed else tuple(backends())
    willing = [
        backend
        for backend in map(backend_named, names)
        if (copies or not backend.copies) and backend.refuses(case) is None
    ]
    if measure and len(willing) > 1:
        return fastest(case, tuple(willing))
    return willing[0] if willing else backend_named("portable")


@contextmanager
def using(*names: str) -> Iterator[None]:
    """Let only these backends serve, and the portable one where they refuse; for measurements.

    Raises:
        ConfigError: There is no backend of such a name.
    """
    for name in names:
        backend_named(name)
    _allowed.append(names)
    try:
        yield
    finally:
        _allowed.pop()


def _needs_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return x.requires_grad or (bias is not None and bias.requires_grad)


def allows(name: str) -> bool:
    """Whether :func:`using` lets a backend serve."""
    return not _allowed or name in _allowed[-1]


def _new_plan(weight: PackedWeight, x: torch.Tensor, act: str | None, key: Any) -> _Plan:
    """Choose a backend and let it prepare the weight, or find that this was done."""
    if x.device != weight.device:
        raise ConfigError(
            f"expected activations on {weight.device}, where the packed weight is; received them "
            f"on {x.device}."
        )
    rows = x.numel() // max(x.shape[-1], 1)
    case = Case(weight.spec, x.device.type, x.dtype, act, rows)
    backend = choose(case, measure=os.environ.get(SWITCH) == "measure")
    kept = weight.plans
    version = None if weight.packed.is_inference() else weight.packed._version
    plan = kept.get((backend.name,))
    if plan is None or plan[2] != version:
        plan = kept[(backend.name,)] = (backend, backend.prepare(weight), version)
    if not _allowed:
        kept[key] = plan
    return plan


register(lambda weight, x, bias, act, scale: linear(weight, x, bias, act=act, act_scale=scale))
