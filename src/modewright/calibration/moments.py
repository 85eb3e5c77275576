# SPDX-License-Identifier: Apache-2.0
"""Second moments of inputs: what least squares on a layer's output needs to know of the data."""

from __future__ import annotations

from collections.abc import Iterable

import torch

Rows = Iterable["torch.Tensor | None"]


def row_weights(rows: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Return what to multiply every row with, ``[n, 1]``, so that none counts too much.

    The first token of a text has inputs a hundred times longer than others in many language
    models, and would be all that a sum of squares sees.

    Args:
        rows: ``[n, in]``.
        limit: How many times the median length a row may have; ``None`` for no limit.
    """
    if limit is None:
        return rows.new_ones(len(rows), 1)
    length = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    weights: torch.Tensor = (length.median() * limit / length).clamp(max=1.0)
    return weights


def second_moments(
    rows: Rows, originals: Rows | None, limit: float | None
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Return ``X^T X`` of a layer's inputs, ``X_original^T X`` if wanted, and the rows seen.

    Args:
        rows: For every call the rows ``[n, in]`` that the layer gets, float32; ``None`` for none.
        originals: Those that it gets in the original network, in the same order; ``None`` if they
            are not wanted.
        limit: Rows longer than so many times the median one of their call are scaled down.
    """
    hessian = cross = torch.zeros(())
    seen = 0
    others = None if originals is None else iter(originals)
    for own in rows:
        other = None if others is None else next(others)
        if own is None or not len(own):
            continue
        seen += len(own)
        weight = row_weights(own, limit)
        scaled = own * weight
        hessian = hessian + scaled.t() @ scaled
        if others is None:
            continue
        if other is None or other.shape != own.shape:  # experts get other tokens than they did
            other = own
        cross = cross + (other * weight).t() @ scaled
    return hessian, (None if others is None else cross), seen
