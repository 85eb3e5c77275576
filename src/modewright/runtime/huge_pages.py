# SPDX-License-Identifier: Apache-2.0
"""Memory for tensors in huge pages, where the system has them.

A product with one row of activations reads its weight once and is held up by looking addresses up:
in pages of two megabytes it is up to a third faster than in those of four kilobytes. Tensors lie
side by side in chunks, aligned to 64 bytes as torch aligns them; chunks begin where a page does. A
chunk is freed when all its tensors are; small tensors, which often outlive the others, do not lie
there.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import cast

import torch

CHUNK_BYTES = 64 * 2**20
SMALL_BYTES = 2**14
PAGE_BYTES = 2 * 2**20
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
        self._place, self._end = 0, 0  # in the chunk, of what is taken next

    def take(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor whose values are yet to come."""
        size = math.prod(shape) * dtype.itemsize
        needed = large_bytes(size)
        if not needed or _HUGE is None:
            return torch.empty(shape, dtype=dtype)
        if self._chunk is None or self._place + needed > self._end:
            others = self._taken if self._expected is None else self._expected - self._taken
            room = max(needed, min(others, CHUNK_BYTES))
            self._chunk, self._place = _chunk(room)
            self._end = self._place + room
        part = torch.frombuffer(self._chunk, dtype=torch.uint8, count=size, offset=self._place)
        self._place += needed
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


def _chunk(size: int) -> tuple[mmap.mmap, int]:
    """Return memory of so many bytes, and where in it they begin."""
    huge = size >= PAGE_BYTES
    if huge:  # whole pages, and what is before the first one, which is not touched
        size = -(-size // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not huge:
        return made, 0
    with contextlib.suppress(OSError):  # a kernel without them serves as well
        made.madvise(cast(int, _HUGE))
    return made, -torch.frombuffer(made, dtype=torch.uint8).data_ptr() % PAGE_BYTES


def _over(storage: torch.UntypedStorage, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous tensor in given memory; it is no view of another tensor."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
