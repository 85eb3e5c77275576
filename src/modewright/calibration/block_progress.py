# SPDX-License-Identifier: Apache-2.0
"""What a walk over blocks has done already, in a folder: one file for each finished block.

A file holds every tensor of the block and the JSON data that its visit returned. A walk that was
interrupted is thereby gone on with after its last finished block, with the same bits.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

Metadata = dict[str, Any]


class BlockProgress:
    """Finished blocks of one walk.

    Args:
        folder: Where the files are; made when the first block is kept.
        fingerprint: Digest of all that decides what a walk does (model, data, config). Files of
            another one are not used.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint

    def keep(self, name: str, module: nn.Module, metadata: Metadata) -> None:
        """Write a finished block; the file appears when it is whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: t.detach().cpu().contiguous() for key, t in _tensors(module).items()}
        unique = {key: tensor.clone() for key, tensor in tensors.items()}
        header = {"fingerprint": self._fingerprint, "metadata": json.dumps(metadata)}
        header["digest"] = _digest(unique, header["metadata"])
        path = self._path(name)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(unique, partial, metadata=header)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, name: str, module: nn.Module) -> Metadata | None:
        """Put a finished block's tensors into the module; return what its visit returned.

        Returns:
            ``None`` if the block is not there, or is damaged, or of another walk, or if its visit
            added tensors that the module has no place for: then it has to be visited again.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("fingerprint") != self._fingerprint:
                    return None
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata = json.loads(header.get("metadata", "null"))
        except (OSError, SafetensorError, ValueError):
            return None
        if header.get("digest") != _digest(tensors, header.get("metadata", "")):
            return None
        if not tensors.keys() <= _places(module):
            return None
        _assign(module, tensors)
        found: Metadata = metadata
        return found

    def _path(self, name: str) -> Path:
        return self._folder / f"block-{sha256(name.encode()).hexdigest()[:16]}.safetensors"


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer that is there, by path."""
    return {
        f"{path}.{key}" if path else key: tensor
        for path, part in module.named_modules()
        for key, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None and not tensor.is_meta
    }


def _places(module: nn.Module) -> set[str]:
    """Return the paths of all parameters that are there, and of all buffers, there or not."""
    return {
        f"{path}.{key}" if path else key
        for path, part in module.named_modules()
        for key in (*(k for k, p in part._parameters.items() if p is not None), *part._buffers)
    }


def _assign(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors in the places that they were read from; what is not among them becomes None.

    What has the right bits already stays, so that whatever shares it goes on sharing it.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for path, part in module.named_modules():
        for key, own in list(part._parameters.items()):
            new = tensors.get(f"{path}.{key}" if path else key)
            if new is not None and own is not None and not _same(own, new):
                made = nn.Parameter(new.to(own.device), requires_grad=own.requires_grad)
                part._parameters[key] = made
        for key, buffer in list(part._buffers.items()):
            value = tensors.get(f"{path}.{key}" if path else key)
            if value is None:
                part._buffers[key] = None
            elif buffer is None or not _same(buffer, value):
                part._buffers[key] = value.to(device if buffer is None else buffer.device)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(_bytes(one), _bytes(other))


def _digest(tensors: dict[str, torch.Tensor], metadata: str) -> str:
    digest = sha256(metadata.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor).numpy().tobytes())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
