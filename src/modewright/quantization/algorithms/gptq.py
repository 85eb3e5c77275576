# SPDX-License-Identifier: Apache-2.0
r"""GPTQ: round a weight column by column, and let the columns that follow make up for the error.

For inputs ``X`` (one row a token) the loss of a layer is ``||X (W - Q)^T||^2``, which depends on
the data through the Hessian ``H = X^T X`` alone. Columns are rounded one after another; what
rounding a column did to the output is undone, in the least-squares sense, by those not rounded yet
(Frantar et al. 2022, *GPTQ*; the recursion is Babai's nearest plane algorithm on the lattice that
``H`` spans, Chen et al. 2025).

Two things go beyond the paper:

* the inputs that a layer sees in the quantized network differ from those it had in the original
  one. With ``C = X_original^T X`` the target ``W' = W (C + d)(H + d)^-1`` is the weight that
  comes closest to the original output on the inputs that the layer really gets (``d`` is the
  damping), and it is ``W'`` that is rounded (:func:`modewright.least_squares.corrected_target`);
* every order of columns is allowed, with scales that stay those of their group ("static groups").
"""

from __future__ import annotations

import torch

from modewright.formats.catalogue import NumberFormat, round_to
from modewright.least_squares import inverse_factor

_FINEST = 16  # columns within which errors are passed on one by one


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    fmt: NumberFormat,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    block: int = 128,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round a weight so that the layer's output changes little on the inputs behind ``hessian``.

    Args:
        weight: ``[out, in]``, what is to be approximated.
        hessian: ``[in, in]``, ``X^T X`` of the layer's inputs, in float32 or float64.
        scale: Effective scale of every weight, ``[out, in]`` (expanded from its group).
        zero_point: The same, or ``None``.
        fmt: The format of the codes.
        damping: Added to the diagonal of the Hessian, as a part of its mean.
        activation_order: Round the columns with the largest inputs first.
        block: Columns whose effect on later ones is applied at once.
        mask: Boolean ``[out, in]``; where it is false the result stands for zero exactly, and the
            columns that follow make up for that too.

    Returns:
        The numbers of the format that stand for the weight, float32 ``[out, in]``.
    """
    order = torch.arange(weight.shape[1], device=weight.device)
    if activation_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    remaining = weight.float()[:, order]
    scale = scale[:, order]
    zero_point = None if zero_point is None else zero_point[:, order]
    remaining, scale = remaining.t().contiguous(), scale.t().contiguous()  # a column is one run
    shift = None if zero_point is None else zero_point.t().contiguous()
    kept = None if mask is None else mask[:, order].t().contiguous()
    chosen = _round(remaining, factor, scale, shift, kept, fmt, (block, _FINEST))
    result = torch.empty_like(weight, dtype=torch.float32)
    result[:, order] = chosen.t()
    return result


def _round(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    kept: torch.Tensor | None,
    fmt: NumberFormat,
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """Round columns ``[in, out]``; codes replace them, errors are passed on to later ones.

    Blocks of ``sizes[0]`` columns are cut into those of ``sizes[1]`` and so on, so that most of
    the arithmetic is products of large matrices.

    Returns:
        The numbers of the format, ``[in, out]``; ``columns`` then holds the scaled errors.
    """
    if not sizes:
        return _round_one_by_one(columns, factor, scale, shift, kept, fmt)
    chosen = torch.empty_like(columns)
    for start in range(0, len(columns), sizes[0]):
        part = slice(start, min(start + sizes[0], len(columns)))
        zeros = None if shift is None else shift[part]
        mask = None if kept is None else kept[part]
        chosen[part] = _round(
            columns[part], factor[part, part], scale[part], zeros, mask, fmt, sizes[1:]
        )
        columns[part.stop :].addmm_(factor[part, part.stop :].t(), columns[part], alpha=-1)
    return chosen


def _round_one_by_one(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    kept: torch.Tensor | None,
    fmt: NumberFormat,
) -> torch.Tensor:
    chosen = torch.empty_like(columns)
    for index in range(len(columns)):
        column = columns[index]
        codes = column / scale[index]
        if kept is not None:
            codes = codes * kept[index]
        if shift is not None:
            codes = torch.round(codes) + shift[index]
        codes = chosen[index] = round_to(codes, fmt)
        if shift is not None:
            codes = codes - shift[index]
        error = (column - codes * scale[index]) / factor[index, index]
        if index + 1 < len(columns):
            columns[index + 1 :].addr_(factor[index, index + 1 :], error, alpha=-1)
        columns[index] = error
    return chosen
