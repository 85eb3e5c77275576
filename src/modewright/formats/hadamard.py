# SPDX-License-Identifier: Apache-2.0
r"""Hadamard matrices: rotations that spread an outlier over all channels.

A Hadamard matrix has entries +1 and -1 and orthogonal rows. Divided by the root of its size it is
a rotation, under which one large value becomes many small ones, all of the same magnitude. A
network can be rotated without changing what it computes (Ashkboos et al. 2024, QuaRot; Tseng et
al. 2024, QuIP#), and then quantizes better.

Sizes: powers of two by Sylvester's doubling (1867), and what Paley (1933) makes of the quadratic
residues of a prime ``q``: ``q + 1`` if ``q % 4 == 3``, and ``2 * (q + 1)`` if ``q % 4 == 1``, each
doubled any number of times. Of the multiples of four up to 150, only 52, 92, 100 and 116 are not
among them. Beyond 1024 a size has to be a doubled one.

All matrices are orthonormal here. Vectors are rows: rotating ``x`` is ``x @ matrix``.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from modewright.errors import ConfigError

_DOUBLINGS = 6  # powers of two are multiplied as matrices of at most 2 ** 6
_LARGEST_BASE = 1024  # Paley's matrices are kept: 8 MiB is the most for one


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return an orthonormal Hadamard matrix, ``[n, n]``; always the same one for a size.

    Raises:
        ConfigError: None of that size is known here.
    """
    matrix = torch.ones(1, 1, dtype=dtype)
    for size in _factors(n):
        matrix = torch.kron(matrix, _signs(size).to(dtype))
    return matrix / math.sqrt(n)


def largest_hadamard_block(n: int) -> int:
    """Return the largest divisor of ``n`` for which a Hadamard matrix is known here.

    Raises:
        ConfigError: ``n`` is not positive.
    """
    if n < 1:
        raise ConfigError(f"a size is 1 or more; received {n}.")
    return next(block for block in range(n, 0, -1) if n % block == 0 and _base(block))


def rotate_last(x: torch.Tensor, block: int, *, inverse: bool = False) -> torch.Tensor:
    """Multiply every ``block`` neighbours on the last axis by a Hadamard matrix.

    The matrix is a Kronecker product of small ones, which are multiplied one after another.

    Args:
        x: ``[..., n]``, any float dtype; half precision is computed in float32.
        block: The size of the matrix, a divisor of ``n``.
        inverse: Multiply by the transpose instead, which undoes the rotation.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ConfigError: ``n`` is no multiple of ``block``, or no matrix of that size is known here.
    """
    sizes = _factors(block)
    if x.shape[-1] % block:
        raise ConfigError(f"blocks of {block} do not fill an axis of {x.shape[-1]}.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    result = x.to(dtype)
    after = block
    for size in sizes:
        after //= size
        signs = _signs(size) if inverse else _signs(size).T
        factor = (signs / math.sqrt(size)).to(result)
        if after == 1:  # one product of matrices, not one for each vector
            result = result.reshape(x.numel() // size, size) @ factor.T
        else:
            result = factor @ result.reshape(x.numel() // (size * after), size, after)
    return result.reshape(x.shape).to(x.dtype)


def _base(n: int) -> int | None:
    """Return the factor of ``n`` that is no power of two and has a matrix; 1 if none is needed."""
    if n < 1:
        return None
    odd = n // (n & -n)
    if odd == 1:
        return 1
    base = 4 * odd
    while base <= min(n, _LARGEST_BASE):
        if n % base == 0 and _prime_of(base):
            return base
        base *= 2
    return None


def _factors(n: int) -> list[int]:
    """Return sizes of matrices whose Kronecker product has size ``n``, the fastest one last."""
    base = _base(n)
    if base is None:
        raise ConfigError(
            f"no Hadamard matrix of size {n} is known here: sizes are 1, 2 and multiples of four "
            "that come from a prime. Rotate in blocks of largest_hadamard_block(n)."
        )
    doublings = (n // base).bit_length() - 1
    whole, rest = divmod(doublings, _DOUBLINGS)
    return [base] * (base > 1) + [2**rest] * (rest > 0) + [2**_DOUBLINGS] * whole


@cache
def _signs(n: int) -> torch.Tensor:
    """Return one factor, entries +1 and -1, ``[n, n]`` float64."""
    prime = None if n & (n - 1) == 0 else _prime_of(n)
    return _sylvester(n) if prime is None else _paley(prime)


def _sylvester(n: int) -> torch.Tensor:
    matrix = _matrix([[1.0]])
    while len(matrix) < n:
        matrix = torch.kron(matrix, _matrix([[1.0, 1.0], [1.0, -1.0]]))
    return matrix


def _paley(prime: int) -> torch.Tensor:
    """Return the matrix of size ``prime + 1``, or ``2 * (prime + 1)`` if ``prime % 4 == 1``."""
    conference = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 1:] = 1.0
    conference[1:, 0] = -1.0 if prime % 4 == 3 else 1.0
    conference[1:, 1:] = _residues(prime)
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        return conference + identity
    return torch.kron(conference, _matrix([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        identity, _matrix([[1.0, -1.0], [-1.0, -1.0]])
    )


def _residues(prime: int) -> torch.Tensor:
    """Return 1 where ``i - j`` is a square modulo the prime, -1 where not, 0 where ``i == j``."""
    places = torch.arange(prime)
    symbol = torch.full((prime,), -1.0, dtype=torch.float64)
    symbol[places.square() % prime] = 1.0
    symbol[0] = 0.0
    return symbol[(places.unsqueeze(1) - places) % prime]


def _prime_of(n: int) -> int | None:
    """Return the prime from which Paley constructs size ``n``, a multiple of four."""
    if _is_prime(n - 1):
        return n - 1
    half = n // 2 - 1
    return half if half % 4 == 1 and _is_prime(half) else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _matrix(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)
