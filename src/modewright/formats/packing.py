# SPDX-License-Identifier: Apache-2.0
"""Codes of 1 to 8 bits without gaps between them.

The last axis becomes one stream of bits, least significant bit first: element ``k`` occupies bits
``k * num_bits`` and on, and bit ``b`` of the stream is bit ``b % 8`` of byte ``b // 8``. Codes of
four bits therefore lie two in a byte, the first in the low half; codes of three bits cross from one
byte to the next. The bits left over in the last byte are zero.

Eight codes fill ``num_bits`` bytes exactly, so the work is done on eight codes at a time.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.errors import ConfigError


def packed_size(n: int, num_bits: int) -> int:
    """Return the bytes that ``n`` codes take."""
    return -(-n * num_bits // 8)


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Return codes as a dense stream of bits: uint8 ``[..., n]`` -> ``[..., packed_size(n)]``.

    Args:
        codes: Numbers below ``2 ** num_bits``, uint8, at least one axis.
        num_bits: Width of a code, 1 to 8.

    Raises:
        ConfigError: The width or the dtype is another, or a code is too large for the width.
    """
    _check(codes, num_bits)
    n = codes.shape[-1]
    if num_bits < 8 and codes.numel() and int(codes.max()) >> num_bits:
        raise ConfigError(f"expected codes of {num_bits} bits; received {int(codes.max())}.")
    eights = _in_rows_of(8, codes)
    packed = torch.zeros(*eights.shape[:-1], num_bits, dtype=torch.uint8, device=codes.device)
    for place in range(8):
        byte, shift = divmod(place * num_bits, 8)
        packed[..., byte] |= eights[..., place] << shift
        if shift + num_bits > 8:
            packed[..., byte + 1] |= eights[..., place] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_size(n, num_bits)]


def unpack(packed: torch.Tensor, num_bits: int, n: int) -> torch.Tensor:
    """Return the ``n`` codes of each stream: uint8 ``[..., packed_size(n)]`` -> ``[..., n]``.

    Args:
        packed: What :func:`pack` returned.
        num_bits: Width of a code, 1 to 8.
        n: How many codes there are on the last axis.

    Raises:
        ConfigError: The width or the dtype is another, or the last axis has another length.
    """
    _check(packed, num_bits)
    if n < 0 or packed.shape[-1] != packed_size(n, num_bits):
        raise ConfigError(
            f"expected {packed_size(n, num_bits)} bytes for {n} codes of {num_bits} bits; received "
            f"{packed.shape[-1]}."
        )
    rows = _in_rows_of(num_bits, packed)
    codes = torch.empty(*rows.shape[:-1], 8, dtype=torch.uint8, device=packed.device)
    for place in range(8):
        byte, shift = divmod(place * num_bits, 8)
        code = rows[..., byte] >> shift
        if shift + num_bits > 8:
            code |= rows[..., byte + 1] << (8 - shift)
        codes[..., place] = code.bitwise_and_((1 << num_bits) - 1)
    return codes.flatten(-2)[..., :n]


def _check(tensor: torch.Tensor, num_bits: int) -> None:
    if not 1 <= num_bits <= 8:
        raise ConfigError(f"num_bits must be 1 to 8; received {num_bits!r}.")
    if tensor.dtype != torch.uint8 or not tensor.ndim:
        raise ConfigError(
            f"expected a tensor of uint8 with at least one axis; received {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )


def _in_rows_of(length: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``[..., n]`` as ``[..., ceil(n / length), length]``, filled up with zeros."""
    missing = -tensor.shape[-1] % length
    if missing:
        tensor = F.pad(tensor, (0, missing))
    return tensor.reshape(*tensor.shape[:-1], tensor.shape[-1] // length, length)
