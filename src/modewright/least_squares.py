# SPDX-License-Identifier: Apache-2.0
"""Least squares on the output of a layer: what both rounding and zeroing of weights rest on.

A layer with weight ``W [out, in]`` turns inputs ``X`` (one row a token) into ``X W^T``. Another
weight ``Q`` changes that by ``||X (W - Q)^T||^2``, which depends on the data through the Hessian
``H = X^T X`` alone.
"""

from __future__ import annotations

import torch


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return a Hessian with a part of its mean added to its diagonal, ``[in, in]``.

    So columns without input are defined: nothing moves them.
    """
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return hessian + torch.eye(len(hessian), device=hessian.device, dtype=hessian.dtype) * (
        damping * mean
    )


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, float32."""
    lower = torch.linalg.cholesky(damped(hessian.double(), damping))
    inverse = torch.cholesky_inverse(lower)
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def corrected_target(
    weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, *, damping: float = 0.01
) -> torch.Tensor:
    """Return the weight whose output on changed inputs is closest to the original output.

    The inputs that a layer sees in a network that was changed before it differ from those it had.
    With ``C = X_original^T X`` that weight is ``W (C + d)(H + d)^-1``, where ``d`` is the damping.

    Args:
        weight: ``[out, in]``, the original weight.
        hessian: ``[in, in]``, ``X^T X`` of the inputs that the layer gets now.
        cross: ``[in, in]``, ``X_original^T X``.
        damping: How strongly the result is held at ``weight``, as a part of the Hessian's mean
            diagonal.
    """
    regular = damped(hessian.double(), damping)
    change: torch.Tensor = torch.linalg.solve(regular, (cross - hessian).double(), left=False)
    return weight + (weight.double() @ change).float()


def output_error(
    weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Return ``||X (W - Q)^T||^2`` of every output, ``[out]``, from the Hessian."""
    difference = (weight - approximation).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum(dim=1)
