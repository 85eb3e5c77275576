# SPDX-License-Identifier: Apache-2.0
r"""Refit: given which weights are kept, the values with the least error in the layer's output.

Every output is a least-squares problem of its own, over the weights that it keeps. They are solved
together by conjugate gradients: one product with the Hessian a step for all of them, a step length
for each (the refinement of Meng et al. 2024, *ALPS*, but with a step length for every output). The
error falls with every step, so the result is never worse than the start.
"""

from __future__ import annotations

import torch

from modewright.least_squares import damped

_TINY = 1e-30


def refit(
    target: torch.Tensor,
    hessian: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    *,
    damping: float = 0.01,
    iterations: int = 20,
) -> torch.Tensor:
    """Return values for the kept weights that bring the output closer to that of ``target``.

    Args:
        target: ``[out, in]``, the weight whose output is to be approximated.
        hessian: ``[in, in]``, ``X^T X`` of the layer's inputs.
        mask: Boolean ``[out, in]``, true where a weight is kept.
        start: ``[out, in]``, values to begin with; those that are not kept are taken as zero.
        damping: Added to the diagonal of the Hessian, as a part of its mean: how strongly the kept
            weights are held at those of ``target``.
        iterations: Steps of conjugate gradients.

    Returns:
        Float32 ``[out, in]``, zero where the mask is false.
    """
    regular = damped(hessian.float(), damping)
    scale = regular.diagonal().reciprocal()  # the preconditioner
    values = start.float() * mask
    residual = ((target.float() - values) @ regular) * mask
    direction = residual * scale
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ regular) * mask
        length = power / (direction * image).sum(1, keepdim=True).clamp_min(_TINY)
        values = values + length * direction
        residual = residual - length * image
        moved = residual * scale
        before, power = power, (residual * moved).sum(1, keepdim=True)
        direction = moved + power / before.clamp_min(_TINY) * direction
    return values
