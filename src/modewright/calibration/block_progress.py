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
        path = self._path(name)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        header = {"fingerprint": self._fingerprint, "metadata": json.dumps(metadata)}
        save_file(unique, partial, metadata={**header, "digest": _digest(unique)})
        partial.replace(path)

    def load(self, name: str, module: nn.Module) -> Metadata | None:
        """Put a finished block's tensors into the module; return what its visit returned.

        Returns:
            ``None`` if the block is not there, or is damaged, or of another walk.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata = json.loads(header.get("metadata", "null"))
        except (OSError, SafetensorError, ValueError):
            return None
        whole = header.get("fingerprint") == self._fingerprint and isinstance(metadata, dict)
        if not whole or header.get("digest") != _digest(tensors):
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
        if tensor is not None
    }


def _assign(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors in the places that they were read from; what is not among them becomes None."""
    for path, part in module.named_modules():
        for key, own in list(part._parameters.items()):
            new = tensors.get(f"{path}.{key}" if path else key)
            if new is not None and (own is None or not torch.equal(own.detach().cpu(), new)):
                trains = own is not None and own.requires_grad
                device = new.device if own is None else own.device
                part._parameters[key] = nn.Parameter(new.to(device), requires_grad=trains)
        device = next((p.device for p in part.parameters()), next(module.parameters()).device)
        for key in list(part._buffers):
            value = tensors.get(f"{path}.{key}" if path else key)
            part._buffers[key] = None if value is None else value.to(device)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
