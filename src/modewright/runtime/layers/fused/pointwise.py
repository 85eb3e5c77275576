# SPDX-License-Identifier: Apache-2.0
"""RMS norms and gated activations of SiLU."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.runtime.layers.fused.base import FusedLayer, kernels_for


class FusedNorm(FusedLayer):
    """``x / sqrt(mean(x ** 2) + eps) * weight``."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # noqa: D102
        weight = cast(torch.Tensor, self._parameters["weight"])
        kernels = kernels_for(hidden_states, weight)
        if kernels is None or hidden_states.shape[-1:] != weight.shape:
            return cast(torch.Tensor, self.own_forward(hidden_states))
        return kernels.rms_norm(hidden_states, weight, cast(float, eps_of(self)))


class FusedGate(FusedLayer):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        kernels = kernels_for(x)
        children: dict[str, Any] = self._modules
        gate, up, down = children["gate_proj"], children["up_proj"], children["down_proj"]
        if kernels is None or gate._forward_hooks:  # a hook may have kept what it saw
            return cast(torch.Tensor, self.own_forward(x))
        gated, other = gate(x), up(x)
        plain = gated.is_contiguous() and other.is_contiguous() and gated.shape == other.shape
        if not plain or kernels_for(gated, other) is None:  # autocast, weights that are trained
            return cast(torch.Tensor, down(F.silu(gated) * other))
        return cast(torch.Tensor, down(kernels.silu_gate_(gated, other)))


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer has what an RMS norm has."""
    weight = layer._parameters.get("weight")
    return (
        type(layer).__name__.endswith("RMSNorm")
        and weight is not None
        and weight.dim() == 1
        and len(layer._parameters) == 1
        and not layer._modules
        and eps_of(layer) is not None
    )


def is_gate(layer: nn.Module) -> bool:
    """Whether a layer has what a gated activation has."""
    children = layer._modules
    return (
        set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and not layer._parameters
        and type(children["act_fn"]).__name__ in ("SiLU", "SiLUActivation")
        and all(isinstance(children[n], nn.Linear) for n in ("gate_proj", "up_proj", "down_proj"))
    )


def eps_of(layer: nn.Module) -> float | None:
    """Return what a norm adds to the mean of squares."""
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    return eps if isinstance(eps, float) else None


def norm_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what an RMS norm should compute."""
    wide, weight = x.float(), cast(torch.Tensor, layer.weight)
    mean = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean + cast(float, eps_of(layer))) * weight).to(x.dtype)


def gate_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a gated activation should compute."""
    own: Any = layer
    return cast(torch.Tensor, own.down_proj(F.silu(own.gate_proj(x)) * own.up_proj(x)))
