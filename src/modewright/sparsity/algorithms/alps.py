# SPDX-License-Identifier: Apache-2.0
r"""ALPS: choose the mask and the values of a sparse weight together, by alternating directions.

The problem ``min ||X (W - D)^T||^2`` over all ``D`` that a pattern allows is split in two (Boyd et
al. 2011, *ADMM*; Meng et al. 2024, *ALPS*): a dense weight ``Z`` that is close to ``W`` in the
layer's output, and a sparse one ``D``, held together by a penalty that grows:

1. ``Z`` = the least of ``||X (W - Z)^T||^2 + rho ||Z - D + V / rho||^2``,
2. ``D`` = what the pattern leaves of ``Z + V / rho``,
3. ``V += rho (Z - D)``.

Inputs are scaled to equal power first, so that step 2 compares what weights are worth and not how
large they are. At last the values on the mask that was found are refitted
(:func:`modewright.sparsity.algorithms.refit.refit`).
"""

from __future__ import annotations

import torch

from modewright.least_squares import damped, output_error
from modewright.sparsity.algorithms.masks import choose_mask
from modewright.sparsity.algorithms.refit import refit
from modewright.sparsity.algorithms.sparsegpt import sparsegpt
from modewright.sparsity.pattern import Pattern

_FIRST_PENALTY = 0.1  # of the scaled Hessian's mean diagonal, which is 1
_EVERY = 3  # iterations between two changes of the penalty
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # by the part of kept weights that changed


def alps(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: float = 0.5,
    *,
    damping: float = 0.01,
    iterations: int = 100,
    refit_iterations: int = 20,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a sparse weight whose output is close to that of a dense one, and its mask.

    What :func:`sparsegpt` finds, refitted, is taken where it is better: output by output if the
    pattern lets outputs differ freely, as N:M does.

    Args:
        weight: ``[out, in]``, what is to be approximated.
        hessian: ``[in, in]``, ``X^T X`` of the layer's inputs.
        pattern: Where zeros may lie.
        sparsity: The part of zeros, if the pattern leaves it open.
        damping: Added to the diagonal of the Hessian, as a part of its mean.
        iterations: Alternations at most; they end when the mask has settled.
        refit_iterations: Steps of conjugate gradients on the final mask.

    Returns:
        The weight, float32 ``[out, in]``, zero where the mask (boolean, the same shape) is false.
    """
    weight = weight.float()
    first, first_mask = sparsegpt(weight, hessian, pattern, sparsity, damping=damping)
    mask, values = _alternate(weight, hessian, pattern, sparsity, damping, iterations)
    regular = damped(hessian.float(), damping)
    found = []
    for kept, start in ((mask, values), (first_mask, first)):
        fitted = refit(weight, hessian, kept, start, damping=damping, iterations=refit_iterations)
        found.append((fitted, kept, output_error(weight, fitted, regular)))
    (one, one_mask, one_error), (two, two_mask, two_error) = found
    if pattern.of:
        better = (one_error <= two_error)[:, None]
        return torch.where(better, one, two), torch.where(better, one_mask, two_mask)
    return (one, one_mask) if one_error.sum() <= two_error.sum() else (two, two_mask)


def _alternate(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    damping: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask that the alternation settles on, and the sparse weight that goes with it."""
    regular = damped(hessian.float(), damping)
    power = regular.diagonal().sqrt()
    scaled = regular / power / power[:, None]
    levels, basis = torch.linalg.eigh(scaled.double())
    levels, basis = levels.float().clamp_min(0), basis.float()
    wanted = weight * power
    image = wanted @ scaled
    sparse, dual = wanted, torch.zeros_like(wanted)
    penalty, mask = _FIRST_PENALTY, torch.ones_like(weight, dtype=torch.bool)
    settled = mask
    inverse = (basis / (levels + penalty)) @ basis.t()
    for step in range(iterations):
        dense = (image - dual + penalty * sparse) @ inverse
        pulled = dense + dual / penalty
        mask = choose_mask(pulled.square(), pattern, sparsity)
        sparse = pulled * mask
        dual = dual + penalty * (dense - sparse)
        if step % _EVERY == _EVERY - 1:
            changed = float((mask ^ settled).sum() / mask.sum().clamp_min(1)) if step > 2 else 1.0
            if not changed:
                break
            penalty *= next(growth for least, growth in _GROWTH if changed >= least)
            settled = mask
            inverse = (basis / (levels + penalty)) @ basis.t()
    return mask, sparse / power
