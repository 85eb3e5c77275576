# SPDX-License-Identifier: Apache-2.0
"""Fused experts: the weights of all experts of a layer in one 3-D parameter.

Most store ``[experts, out, in]``, some ``[experts, in, out]``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")
_WIDTHS = ("hidden_dim", "hidden_size", "input_size")


def is_experts(module: nn.Module) -> bool:
    """Whether a layer holds the weights of several experts in 3-D parameters."""
    return bool(fused_parameters(module))


def fused_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that hold the weights of several experts."""
    counts = {module.__dict__.get(name) for name in _COUNTS}
    named = "Experts" in type(module).__name__
    return tuple(
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not is_lazy(parameter)
        and parameter.ndim == 3
        and parameter.is_floating_point()
        and not name.endswith("bias")
        and (parameter.shape[0] in counts or (named and not counts - {None}))
    )


def is_transposed(module: nn.Module, name: str) -> bool:
    """Whether a parameter is ``[experts, in, out]``: as the layer says, or as the sizes fit."""
    declared = module.__dict__.get("is_transposed")
    if isinstance(declared, bool):
        return declared
    shape = cast(torch.Tensor, module._parameters[name]).shape
    width = next((module.__dict__[n] for n in _WIDTHS if n in module.__dict__), None)
    hidden = 2 if "down" in name else 1  # where the model's width lies if it is transposed
    return shape[hidden] == width != shape[3 - hidden]
