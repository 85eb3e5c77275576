# SPDX-License-Identifier: Apache-2.0
"""Memory for tensors in huge pages, where the system has them.

A product with one row of activations reads its weight once and is held up by looking addresses up:
in pages of two megabytes it is up to a fifth faster than in those of four kilobytes. Tensors lie
side by side in chunks, aligned to 64 bytes as torch aligns them. A chunk is freed when all its
tensors are; small tensors, which often outlive the others, do not lie there.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

CHUNK_BYTES = 16 * 2**20
SMALL_BYTES = 2**14
_ALIGNMENT = 64
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has them


class HugePages:
    """Memory for tensors, one after the other.

    Args:
        large_bytes: How many bytes all tensors that are not small take, as :func:`large_bytes`
            counts them. Without it chunks grow with what was taken.
    """

    def __init__(self, large_bytes: int | None = None) -> None:
        self._expected = large_bytes
        self._taken = 0
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def take(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor whose values are yet to come."""
        size = math.prod(shape) * dtype.itemsize
        needed = large_bytes(size)
        if not needed or _HUGE is None:
            return torch.empty(shape, dtype=dtype)
        if self._chunk is None or self._used + needed > len(self._chunk):
            others = self._taken if self._expected is None else self._expected - self._taken
            self._chunk = mmap.mmap(
                -1,
                max(needed, min(others, CHUNK_BYTES)),
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            )
            with contextlib.suppress(OSError):  # a kernel without them serves as well
                self._chunk.madvise(_HUGE)
            self._used = 0
        part = torch.frombuffer(self._chunk, dtype=torch.uint8, count=size, offset=self._used)
        self._used += needed
        self._taken += needed
        return _over(part.untyped_storage(), shape, dtype)

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the same values in this memory; one that is on no CPU as it is."""
        if tensor.device.type != "cpu" or not large_bytes(tensor.nbytes):
            return tensor
        return self.take(list(tensor.shape), tensor.dtype).copy_(tensor)


def large_bytes(size: int) -> int:
    """Return how much of a chunk a tensor of so many bytes takes: none if it is small."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT if size >= SMALL_BYTES else 0


def _over(storage: torch.UntypedStorage, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous tensor in given memory; it is no view of another tensor."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
