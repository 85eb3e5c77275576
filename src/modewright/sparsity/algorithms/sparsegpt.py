# SPDX-License-Identifier: Apache-2.0
r"""SparseGPT: go through a weight column by column; later columns make up for what becomes zero.

The score of a weight is what is lost in the output when it becomes zero and the columns after it
make up for that as well as they can: ``w^2 / [U]_jj^2``, with ``U`` the upper Cholesky factor of
the inverse Hessian (Frantar & Alistarh 2023, *SparseGPT*; Hassibi & Stork 1993, *Optimal Brain
Surgeon*). Columns are taken in runs; where a pattern compares more than one column, the mask of a
run is chosen when the run is reached, from the weights as they are then.
"""

from __future__ import annotations

import torch

from modewright.least_squares import inverse_factor
from modewright.sparsity.algorithms.masks import choose_mask
from modewright.sparsity.pattern import Pattern

_RUN = 128  # columns whose effect on later ones is applied at once


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: float = 0.5,
    *,
    damping: float = 0.01,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a sparse weight whose output is close to that of a dense one, and its mask.

    Args:
        weight: ``[out, in]``, what is to be approximated.
        hessian: ``[in, in]``, ``X^T X`` of the layer's inputs.
        pattern: Where zeros may lie.
        sparsity: The part of zeros, if the pattern leaves it open; of every run of columns.
        damping: Added to the diagonal of the Hessian, as a part of its mean.
        mask: Boolean ``[out, in]``: what to keep, if that is decided already.

    Returns:
        The weight, float32 ``[out, in]``, zero where the mask (boolean, the same shape) is false.
    """
    columns = weight.float().t().contiguous()  # a column is one run of memory
    factor = inverse_factor(hessian, damping)
    kept = torch.zeros_like(columns, dtype=torch.bool) if mask is None else mask.t().contiguous()
    unit = pattern.of or pattern.tile[1]
    compared = unit if pattern.of else max(unit, _RUN // unit * unit)
    run = max(compared, _RUN // compared * compared)
    for start in range(0, len(columns), run):
        stop = min(start + run, len(columns))
        errors = torch.zeros_like(columns[start:stop])
        for index in range(start, stop):
            if mask is None and (index - start) % compared == 0:
                part = slice(index, min(index + compared, stop))
                scores = (columns[part] / factor.diagonal()[part, None]).square()
                kept[part] = choose_mask(scores.t(), pattern, sparsity).t()
            lost = columns[index].masked_fill(kept[index], 0) / factor[index, index]
            columns[index] *= kept[index]
            columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], lost, alpha=-1)
            errors[index - start] = lost
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return columns.t().contiguous(), kept.t().contiguous()
