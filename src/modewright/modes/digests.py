# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint and comparing the digest of every tensor."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from modewright.errors import CheckpointError
from modewright.modes.manifest import Manifest, tensor_digest
from modewright.modes.storage import Tensors, read_tensors

_WORTH_A_THREAD = 2**16  # bytes; smaller tensors are hashed before a thread would begin


def checked_tensors(
    where: Path, manifest: Manifest, *, keep: Callable[[str], bool] | None = None
) -> Tensors:
    """Read all tensors and compare their digests, which other threads compute meanwhile.

    Args:
        where: The checkpoint.
        manifest: What it says of itself.
        keep: Which tensors to return, by name: the others are in memory for a moment only. All if
            left out.

    Raises:
        CheckpointError: A tensor is missing, too much, or not what was written.
    """
    tensors: Tensors = {}
    damaged: list[str] = []
    waiting: deque[tuple[str, Future[str]]] = deque()
    entries = manifest.tensors

    def compare(at_most: int) -> None:
        while len(waiting) > at_most:
            name, digest = waiting.popleft()
            if digest.result() != entries[name].sha256:
                damaged.append(name)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for name, tensor in read_tensors(where, manifest):
            if keep is None or keep(name):
                tensors[name] = tensor
            if tensor.nbytes > _WORTH_A_THREAD:
                waiting.append((name, pool.submit(tensor_digest, tensor)))
                compare(at_most=2 * workers)
            elif tensor_digest(tensor) != entries[name].sha256:
                damaged.append(name)
        compare(at_most=0)
    if damaged:
        raise CheckpointError(
            f"{where} is damaged: the SHA-256 of {len(damaged)} of {len(entries)} tensors does not "
            f"match ({', '.join(damaged[:5])}{' ...' if len(damaged) > 5 else ''}). Copy it anew "
            "from its source."
        )
    return tensors
