# SPDX-License-Identifier: Apache-2.0
"""What a linear layer's lost inputs cost once the others make up for them, and how they do.

A layer ``y = W x`` is known by the second moments of its inputs, ``H = sum x x^T``. Without the
inputs of some units the best that the others can do is a least-squares problem, and what is left of
the error is known before it is solved (optimal brain surgeon, Hassibi and Stork 1993; for whole
structures ZipLM, Kurtic et al. 2023).
"""

from __future__ import annotations

import torch

_SMALLEST = 1e-12


def ridge(
    weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, damping: float
) -> torch.Tensor:
    """Return the matrix nearest to what data wants, held back towards the one that is there.

    It minimises ``sum |t - W x|^2 + d |W - weight|^2`` with ``d`` = ``damping`` times the mean
    diagonal of the second moments.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``sum x x^T`` over inputs, ``[in, in]`` float32.
        cross: ``sum t x^T`` with the wanted outputs ``t``, ``[out, in]`` float32.
        damping: How much the present weight counts.

    Returns:
        ``[out, in]`` float32.
    """
    factor = torch.linalg.cholesky(_damped(hessian, damping))
    step = torch.cholesky_solve((cross - weight @ hessian).t(), factor)
    return weight + step.t()


def unit_costs(
    weight: torch.Tensor, hessian: torch.Tensor, units: torch.Tensor, damping: float
) -> torch.Tensor:
    """Return by how much the squared error of a layer's output grows without each unit's inputs.

    The other inputs make up for the lost ones as well as they can, so this is not what is lost by
    setting weights to zero, but what remains lost.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``sum x x^T`` over inputs, ``[in, in]`` float32.
        units: ``[units, k]`` int64: the inputs that belong to each unit.
        damping: Added to the diagonal, as a part of its mean.

    Returns:
        ``[units]`` float32.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(hessian, damping)))
    parts = weight[:, units].permute(1, 2, 0)  # [units, k, out]
    blocks = inverse[units[:, :, None], units[:, None, :]]  # [units, k, k]
    if units.shape[1] == 1:
        return parts.square().sum((1, 2)) / blocks[:, 0, 0]
    solved = torch.cholesky_solve(parts, torch.linalg.cholesky(blocks))
    return (parts * solved).sum((1, 2))


def removal_order(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    units: torch.Tensor,
    *,
    damping: float,
    minimum: int = 1,
    rounds: int = 8,
) -> list[int]:
    """Return in which order units are best removed, the least important first.

    In every round the units that cost least are removed together, and the weight is solved anew for
    the rest, so that of two units that can stand in for each other only one goes.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``sum x x^T`` over inputs, ``[in, in]`` float32.
        units: ``[units, k]`` int64: the inputs that belong to each unit.
        damping: Added to the diagonal of the second moments, as a part of its mean.
        minimum: How many units stay at least.
        rounds: How often the weight is solved anew.

    Returns:
        Places of units in ``units``; those that stay are not among them.
    """
    cross = weight @ _damped(hessian, damping)
    left = torch.arange(len(units))
    order: list[int] = []
    removable = len(units) - minimum
    for turn in range(rounds):
        count = removable * (turn + 1) // rounds - len(order)
        if count < 1:
            continue
        inputs = units[left].flatten()
        own = hessian[inputs][:, inputs]
        places = torch.arange(len(inputs)).reshape(len(left), -1)
        solved = _solved(cross[:, inputs], own, damping)
        costs = unit_costs(solved, own, places, damping)
        gone = costs.argsort(stable=True)[:count].cpu()
        order += left[gone].tolist()
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        left = left[stays]
    return order


def _solved(cross: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    factor = torch.linalg.cholesky(_damped(hessian, damping))
    return torch.cholesky_solve(cross.t(), factor).t()


def _damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return second moments to which a part of their mean diagonal is added."""
    amount = (damping * hessian.diagonal().mean()).clamp_min(_SMALLEST)
    return hessian + amount * torch.eye(len(hessian)).to(hessian)
