# SPDX-License-Identifier: Apache-2.0
"""Random rotations, beside the Hadamard matrices of :mod:`modewright.formats.hadamard`.

Matrices are orthonormal. Vectors are rows: rotating ``x`` is ``x @ matrix``.
"""

from __future__ import annotations

import torch

from modewright.formats.hadamard import hadamard_matrix, largest_hadamard_block, rotate_last

__all__ = [
    "hadamard_matrix",
    "largest_hadamard_block",
    "random_orthogonal",
    "randomized_hadamard",
    "rotate_last",
]


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random rotation (or reflection), ``[n, n]`` float64, uniform over all of them.

    The QR decomposition of a Gaussian matrix, with signs that make it unique (Mezzadri 2007).
    """
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device=generator.device)
    basis, triangle = torch.linalg.qr(gaussian)
    flipped: torch.Tensor = triangle.diagonal() < 0
    return torch.where(flipped, -basis, basis).contiguous()


def randomized_hadamard(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random orthogonal matrix, ``[n, n]`` float64, that mixes as a Hadamard one does.

    Rows of the largest Hadamard matrix that divides ``n`` get random signs; what is left of ``n``
    is mixed by a random rotation: ``diag(signs) @ kron(rotation, hadamard)``.

    Raises:
        ConfigError: ``n`` is not positive.
    """
    block = largest_hadamard_block(n)
    rotation = random_orthogonal(n // block, generator)
    bits = torch.randint(0, 2, (n, 1), generator=generator, device=generator.device)
    return (2.0 * bits - 1.0) * torch.kron(rotation, hadamard_matrix(block).to(rotation))
