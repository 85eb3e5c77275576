# SPDX-License-Identifier: Apache-2.0
"""From scores to masks: the weights with the highest scores are kept, as a pattern allows."""

from __future__ import annotations

import torch

from modewright.sparsity.pattern import Pattern

_FEW = 16  # so many scores are compared in pairs


def choose_mask(
    scores: torch.Tensor, pattern: Pattern, sparsity: float = 0.5, *, by_row: bool = False
) -> torch.Tensor:
    """Return which weights are kept.

    Args:
        scores: ``[out, in]``, not negative: how much is lost with every weight. They add up: what a
            tile is worth is the sum of its scores.
        pattern: Where zeros may lie. For N:M, ``in`` is a multiple of M; tiles at the edges may be
            smaller.
        sparsity: The part of the weights (or tiles) that become zero, if the pattern leaves it
            open. Of a count that is not whole the nearest whole number is taken.
        by_row: Whether every output (every row of tiles) loses as many, or the whole matrix is
            compared.

    Returns:
        Boolean ``[out, in]``, true where a weight is kept. Of equal scores the first are kept.
    """
    if pattern.of:
        groups = scores.reshape(len(scores), -1, pattern.of)
        return _largest(groups, pattern.kept).reshape(scores.shape)
    tiles = _tile_sums(scores, pattern.tile)
    flat = tiles if by_row else tiles.reshape(1, -1)
    kept = flat.shape[1] - round(flat.shape[1] * sparsity)
    mask = _largest(flat, kept).reshape(tiles.shape)
    rows, columns = pattern.tile
    mask = mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return mask[: scores.shape[0], : scores.shape[1]]


def follows(mask: torch.Tensor, pattern: Pattern) -> bool:
    """Return whether what a mask ``[out, in]`` keeps is allowed by a pattern."""
    if pattern.of:
        groups = mask.reshape(len(mask), -1, pattern.of)
        return bool((groups.sum(-1) <= pattern.kept).all())
    sums = _tile_sums(mask.float(), pattern.tile)
    full = _tile_sums(torch.ones_like(mask, dtype=torch.float32), pattern.tile)
    return bool(((sums == 0) | (sums == full)).all())


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the ``count`` largest along the last axis are; of equal ones the first."""
    width = scores.shape[-1]
    if width <= _FEW:
        return _ranks(scores) < count
    if not 0 < count < width:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = scores.kthvalue(width - count + 1, dim=-1, keepdim=True).values
    mask, equal = scores > least, scores == least
    missing = count - mask.sum(-1, keepdim=True)
    return mask | (equal & (equal.cumsum(-1) <= missing))


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return how many of the few along the last axis come before each one."""
    columns = [column.contiguous() for column in scores.unbind(-1)]
    ranks = [torch.zeros_like(column, dtype=torch.int16) for column in columns]
    for late in range(1, len(columns)):
        for early in range(late):
            larger = columns[late] > columns[early]
            ranks[early] += larger
            ranks[late] += ~larger
    return torch.stack(ranks, dim=-1)


def _tile_sums(scores: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Return the sum over every tile, ``[rows of tiles, columns of tiles]``."""
    rows, columns = tile
    if tile == (1, 1):
        return scores
    pad = (0, -scores.shape[1] % columns, 0, -scores.shape[0] % rows)
    padded = torch.nn.functional.pad(scores, pad)
    grid = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return grid.sum(dim=(1, 3))
