# SPDX-License-Identifier: Apache-2.0
"""Reading the tensors of a safetensors file straight into memory of their own.

Nothing is mapped and copied: a tensor takes its bytes once. The memory is aligned to 64 bytes, as
torch aligns it, wherever the bytes lie in the file: matrix kernels may choose another path, and
other last bits, for memory that is not. What is large lies in huge pages
(:mod:`modewright.runtime.huge_pages`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modewright.errors import CheckpointError
from modewright.runtime.huge_pages import HugePages, large_bytes

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
        memory = HugePages(sum(_large_bytes(header[name]) for name in names))
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


def _large_bytes(entry: dict[str, Any]) -> int:
    first, last = entry["data_offsets"]
    return large_bytes(last - first)


def _fill(tensor: torch.Tensor, file: io.FileIO, path: Path) -> None:
    """Read as many bytes as a tensor has into it."""
    rest: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise CheckpointError(f"{path} ended {len(rest)} bytes too early: it was cut off.")
        rest = rest[count:]
