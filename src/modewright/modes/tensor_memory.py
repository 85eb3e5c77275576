# SPDX-License-Identifier: Apache-2.0
"""Reading the tensors of a safetensors file straight into memory of their own.

Nothing is mapped and copied: a tensor takes its bytes once. The memory is aligned to 64 bytes, as
torch aligns it, wherever the bytes lie in the file: matrix kernels may choose another path, and
other last bits, for memory that is not.

Where the system has huge pages, tensors lie side by side in chunks of them: a multiplication that
reads a weight once is held up by looking addresses up. A chunk is freed when all its tensors are;
small tensors, which often outlive the others, do not lie there.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modewright.errors import CheckpointError

CHUNK_BYTES = 16 * 2**20
SMALL_BYTES = 2**14
_ALIGNMENT = 64
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has them
_PREFIX = 8  # bytes before the header that say how long it is
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_into_memory(
    path: Path, reader: Any, names: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors one after the other.

    Args:
        path: The file.
        reader: The file opened by ``safetensors.safe_open``, which has checked its header.
        names: What to read.

    Raises:
        CheckpointError: The file is shorter than its header says.
    """
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        header = json.loads(file.read(length))
        memory = _Memory(sum(_large_bytes(header[name]) for name in names))
        for name in names:
            entry = header[name]
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                yield name, reader.get_tensor(name).clone()
                continue
            tensor = memory.take(entry["shape"], dtype)
            if tensor.numel():
                file.seek(_PREFIX + length + entry["data_offsets"][0])
                _fill(tensor, file, path)
            yield name, tensor


class _Memory:
    """Memory for tensors, one after the other.

    Args:
        large_bytes: How many bytes all tensors take that are not small.
    """

    def __init__(self, large_bytes: int) -> None:
        self._to_come = large_bytes
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def take(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor whose values are yet to come."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALL_BYTES or _HUGE is None:
            return torch.empty(shape, dtype=dtype)
        needed = _aligned(size)
        if self._chunk is None or self._used + needed > len(self._chunk):
            self._chunk = mmap.mmap(
                -1,
                max(needed, min(self._to_come, CHUNK_BYTES)),
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            )
            with contextlib.suppress(OSError):  # a kernel without them serves as well
                self._chunk.madvise(_HUGE)
            self._used = 0
        part = torch.frombuffer(self._chunk, dtype=torch.uint8, count=size, offset=self._used)
        self._used += needed
        self._to_come -= needed
        return _over(part.untyped_storage(), shape, dtype)


def _over(storage: torch.UntypedStorage, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous tensor in given memory; it is no view of another tensor."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)


def _large_bytes(entry: dict[str, Any]) -> int:
    first, last = entry["data_offsets"]
    return _aligned(last - first) if last - first >= SMALL_BYTES else 0


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _fill(tensor: torch.Tensor, file: io.FileIO, path: Path) -> None:
    """Read as many bytes as a tensor has into it."""
    rest: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise CheckpointError(f"{path} ended {len(rest)} bytes too early: it was cut off.")
        rest = rest[count:]
