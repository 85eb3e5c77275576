# SPDX-License-Identifier: Apache-2.0
"""What is lost with a single weight: scores that add up, for choosing masks."""

from __future__ import annotations

import torch


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """Return the squares of the weights: what is lost if all inputs are alike."""
    return weight.float().square()


def wanda_scores(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return ``w^2 ||x||^2``: what is lost if inputs are not correlated (Sun et al. 2023, *Wanda*).

    The paper's score is the root of it, which gives the same order.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, ``X^T X``.
    """
    return weight.float().square() * hessian.diagonal().float()
