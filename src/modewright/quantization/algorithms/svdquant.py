# SPDX-License-Identifier: Apache-2.0
r"""SVDQuant: a branch of low rank beside the quantized weight takes what quantization cannot.

The weight becomes ``Q(W - up @ down) + up @ down``, with the branch in high precision. Started
from the largest singular vectors of ``W``, the branch takes the outliers and leaves a residual that
is easier to quantize (Li et al. 2024, "SVDQuant"). Then branch and residual alternate: the best
branch for a fixed quantized part is the truncated SVD of ``W - Q(W - up @ down)`` (as in Li et al.
2023, "LoftQ").

With ``importance``, the mean square of every input, errors are weighted by it: the SVD is that of
the matrix with columns multiplied by its root, which is the best low rank in that norm (Eckart and
Young 1936). The branch with the least weighted error is kept, and none at all (zeros) if no branch
is better, so the result is never worse than plain quantization.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from modewright.errors import ConfigError, DataError

_OVERSAMPLING = 8
_POWER_ITERATIONS = 4
_FLOOR = 1e-6  # of the mean importance: columns are divided by its root


def low_rank(
    weight: torch.Tensor,
    rank: int,
    fake_quantize: Callable[[torch.Tensor], torch.Tensor],
    iterations: int = 4,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the branch of low rank beside a quantized weight.

    Args:
        weight: ``[out, in]``, any float dtype.
        rank: The inner size of the branch: 1 to the smaller side of the weight.
        fake_quantize: Returns what quantization leaves of the residual: ``[out, in]`` in and out,
            in the dtype of the weight.
        iterations: How often branch and residual alternate after the start.
        importance: What the squared error of each input counts, ``[in]``, not negative; ``None``
            counts all alike.

    Returns:
        ``up`` ``[out, rank]`` and ``down`` ``[rank, in]`` in the dtype of the weight.

    Raises:
        ConfigError: There is no branch of that rank.
        DataError: The weight holds values that are not finite.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ConfigError(
            f"the rank of a branch beside a weight of {list(weight.shape)} is 1 to "
            f"{min(weight.shape)}; received {rank}."
        )
    if not torch.isfinite(weight).all():
        raise DataError("a weight with values that are NaN or infinite has no singular vectors.")
    original = weight.detach().float()
    root = _root(importance, original)
    best = (weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1]))
    left = original - fake_quantize(weight.detach()).float()
    error = (left * root).square().sum()
    target = original  # of the first branch: it takes the weight's outliers
    for _ in range(1 + iterations):
        up, down = truncated_svd(target * root, rank)
        branch = (up.to(weight.dtype), (down / root).to(weight.dtype))
        product = branch[0].float() @ branch[1].float()
        quantized = fake_quantize((original - product).to(weight.dtype)).float()
        target = original - quantized
        changed = ((target - product) * root).square().sum()
        if changed < error:
            best, error = branch, changed
    return best


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``up`` ``[m, rank]`` and ``down`` ``[rank, n]``, close to the best product of them.

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011) from a fixed seed: the same
    matrix gives the same factors.
    """
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    size = values[:rank].sqrt()
    return basis @ left[:, :rank] * size, size.unsqueeze(-1) * right[:rank]


def _root(importance: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Return what columns are multiplied by, ``[in]``: positive, of mean square 1."""
    if importance is None:
        return weight.new_ones(weight.shape[1])
    values = importance.detach().float()
    tiny = torch.finfo(torch.float32).tiny
    return (values / values.mean().clamp_min(tiny)).clamp_min(_FLOOR).sqrt()
