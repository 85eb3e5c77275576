# SPDX-License-Identifier: Apache-2.0
"""How far two tensors, or two dictionaries of tensors, are from each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from modewright.errors import DataError

Tensors = torch.Tensor | Mapping[str, torch.Tensor]


def tensors_identical(a: Tensors, b: Tensors) -> bool:
    """Tell whether two tensors, or two dictionaries of tensors, are the same bit for bit.

    Identical means the same dtype, shape and bits. So -0.0 and 0.0 differ, and NaN equals NaN
    where the payloads are equal. Memory layout, device, ``requires_grad`` and the order of
    dictionary keys do not matter.

    Args:
        a: A tensor, or a dictionary of tensors such as a state dict.
        b: The other one.

    Returns:
        Whether they are identical; ``False`` for a tensor and a dictionary, or other keys.

    Raises:
        DataError: A value is not a dense tensor.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_bits(a[key], b[key]) for key in a)
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        return False
    return _same_bits(a, b)


def max_abs_difference(a: Tensors, b: Tensors) -> float:
    """Return the largest absolute difference of two tensors or dictionaries, element by element.

    Equal infinities differ by 0, NaN against anything by NaN. The difference is taken in float64.

    Args:
        a: A tensor, or a dictionary of tensors such as a state dict.
        b: The other one, of the same shapes and with the same keys; dtypes may differ.

    Returns:
        The difference; 0.0 where there is nothing to compare, ``nan`` where any difference is.

    Raises:
        DataError: Keys or shapes differ, or a value is not a dense tensor.
    """
    largest = 0.0
    for where, left, right in _pairs(a, b):
        if left.shape != right.shape:
            raise DataError(
                f"{where}: expected tensors of one shape, got {list(left.shape)} and "
                f"{list(right.shape)}."
            )
        if left.numel() == 0:
            continue
        x, y = _wide(left), _wide(right)
        found = float((x - y).abs().masked_fill(x == y, 0.0).max())
        largest = found if math.isnan(found) or found > largest else largest
        if math.isnan(largest):
            break
    return largest


def cosine_similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine of the angle between the rows of two tensors, averaged over the rows.

    A row is everything along the last dimension; a tensor of one dimension is one row. Two rows
    of zeros count as equal (1), a row of zeros against another one as 0.

    Args:
        a: A floating-point tensor, shape ``[..., d]``.
        b: Another one of the same shape; dtypes may differ.

    Returns:
        A number from -1 to 1, computed in float64; ``nan`` where a value is not finite.

    Raises:
        DataError: Shapes differ, or there is nothing to compare.
    """
    _check_dense(a, "a")
    _check_dense(b, "b")
    if a.shape != b.shape or a.numel() == 0 or a.ndim == 0 or a.is_complex() or b.is_complex():
        raise DataError(
            "Expected two real tensors of one shape [..., d] with at least one element, got "
            f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}."
        )
    x, y = _unit_rows(_wide(a)), _unit_rows(_wide(b))
    cosines = (x * y).sum(dim=-1).clamp(-1.0, 1.0)
    both_zero = (x == 0).all(dim=-1) & (y == 0).all(dim=-1)
    return float(cosines.masked_fill(both_zero, 1.0).mean())


def _unit_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Scale every row of a float64 tensor to length 1; rows of zeros stay as they are."""
    largest = tensor.abs().amax(dim=-1, keepdim=True)
    # Scaled by the largest element first, so that no square overflows or underflows.
    scaled = tensor / largest.masked_fill(largest == 0, 1.0)
    length = scaled.square().sum(dim=-1, keepdim=True).sqrt()
    return scaled / length.masked_fill(length == 0, 1.0)


def _pairs(a: Tensors, b: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the tensors to compare with a name for error messages."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            raise DataError(
                f"Expected the same keys; only the first has {sorted(a.keys() - b.keys())[:5]}, "
                f"only the second has {sorted(b.keys() - a.keys())[:5]} (5 at most are shown)."
            )
        for key in a:
            _check_dense(a[key], f"{key} (first)")
            _check_dense(b[key], f"{key} (second)")
            yield key, a[key], b[key]
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        _check_dense(a, "a")
        _check_dense(b, "b")
        yield "tensors", a, b
    else:
        raise DataError(
            f"Expected two tensors or two dictionaries of tensors, got {type(a).__name__} and "
            f"{type(b).__name__}."
        )


def _check_dense(value: object, where: str) -> None:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        got = value.layout if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"{where}: expected a dense tensor, got {got}.")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in the main memory as float64 (complex128 for complex numbers)."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().cpu().to(wide)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    _check_dense(a, "a")
    _check_dense(b, "b")
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, uint8, in the order of its elements."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)
