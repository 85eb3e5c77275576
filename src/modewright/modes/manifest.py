# SPDX-License-Identifier: Apache-2.0
"""``Manifest``: what a checkpoint says of itself, and the checks of what it says.

A manifest is one JSON object: the mode state, and for every stored tensor its dtype, shape, SHA-256
and file; names of tied tensors point to the one that is stored; and its own SHA-256. It lies in the
header of a safetensors file, or in ``mode_state.json`` of a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from modewright._version import __version__
from modewright.errors import CheckpointError
from modewright.modes.codec import dumps, loads
from modewright.modes.state import SCHEMA_VERSION

FORMAT = "modewright-checkpoint"
METADATA_PREFIX = "modewright.metadata"

Migration = Callable[[dict[str, Any]], dict[str, Any]]
# Schema version -> function to the next one. Kept for ever, with a fixture in tests/data each.
MIGRATIONS: dict[int, Migration] = {}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its dtype and shape, the digest of its bytes, and the file it lies in."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        state: The mode state as plain data; ``{"$tensor": name}`` stands for a tensor.
        tensors: Every stored tensor by name; those of the state's metadata start with
            ``modewright.metadata``.
        aliases: Names under which a stored tensor is known besides its own (tied weights).
        modewright_version: The version that wrote it.
    """

    state: dict[str, Any]
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str] = field(default_factory=dict)
    modewright_version: str = __version__

    @property
    def weight_names(self) -> list[str]:
        """All names of the model's state dict, tied ones included."""
        own = [n for n in self.tensors if not n.startswith(METADATA_PREFIX)]
        return [*own, *self.aliases]

    def dumps(self) -> str:
        """Return the manifest as JSON text that carries its own digest."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "modewright_version": self.modewright_version,
            "state": self.state,
            "tensors": {name: vars(entry) for name, entry in self.tensors.items()},
            "aliases": self.aliases,
        }
        return dumps({**body, "sha256": _digest(body)})

    @classmethod
    def loads(cls, text: str | bytes, where: str) -> Manifest:
        """Read a manifest, of this or an older schema.

        Raises:
            CheckpointError: It is damaged, has another form, or is newer than this version reads.
        """
        body = loads(text, f"The manifest of {where}", error=CheckpointError)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise CheckpointError(
                f"{where} is not a modewright checkpoint: its manifest is foreign."
            )
        digest = body.pop("sha256", None)
        if digest != _digest(body):
            raise CheckpointError(
                f"The manifest of {where} is damaged: its SHA-256 does not match. Copy the file "
                "anew from its source."
            )
        return cls._parse(migrate(body, where), where)

    @classmethod
    def _parse(cls, body: dict[str, Any], where: str) -> Manifest:
        state, tensors, aliases = body.get("state"), body.get("tensors"), body.get("aliases", {})
        if not (
            isinstance(state, dict) and isinstance(tensors, dict) and isinstance(aliases, dict)
        ):
            raise CheckpointError(
                f"The manifest of {where} must hold the objects state, tensors and aliases."
            )
        entries = {name: _entry(name, value, where) for name, value in tensors.items()}
        for alias, name in aliases.items():
            if not isinstance(name, str) or name not in entries or alias in entries:
                raise CheckpointError(
                    f"The manifest of {where} ties {alias!r} to {name!r}, which is not stored."
                )
        version = body.get("modewright_version")
        return cls(
            state=state,
            tensors=entries,
            aliases=dict(aliases),
            modewright_version=version if isinstance(version, str) else "unknown",
        )


def migrate(
    body: dict[str, Any],
    where: str,
    *,
    migrations: Mapping[int, Migration] = MIGRATIONS,
    current: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """Return ``body`` in the current schema.

    Raises:
        CheckpointError: It is newer than ``current``, or no migration leads on from it.
    """
    version = body.get("schema_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{where} has the schema version {version!r}; 1 or more was expected."
        )
    if version > current:
        raise CheckpointError(
            f"{where} has schema version {version}, written by modewright "
            f"{body.get('modewright_version', '(unknown)')}; this is modewright {__version__}, "
            f"which reads up to {current}. Upgrade modewright to at least that version."
        )
    while version < current:
        if version not in migrations:
            raise CheckpointError(f"{where}: no migration leads on from schema version {version}.")
        try:
            body = migrations[version](body)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{where} has schema version {version} and could not be migrated: it is damaged "
                f"({type(error).__name__}: {error})."
            ) from error
        version += 1
        body["schema_version"] = version
    return body


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype that a manifest names, such as ``torch.float32``.

    Raises:
        CheckpointError: torch has none of that name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"The manifest names the dtype {name!r}, which torch lacks.")
    return dtype


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a CPU tensor's dtype, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _entry(name: str, value: object, where: str) -> TensorEntry:
    if isinstance(value, dict) and set(value) == {"dtype", "shape", "sha256", "file"}:
        shape, texts = value["shape"], (value["dtype"], value["sha256"], value["file"])
        if (
            all(isinstance(text, str) for text in texts)
            and isinstance(shape, list)
            and all(type(size) is int and size >= 0 for size in shape)
        ):
            return TensorEntry(value["dtype"], tuple(shape), value["sha256"], value["file"])
    raise CheckpointError(f"The manifest of {where} describes the tensor {name!r} wrongly.")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(dumps(body).encode()).hexdigest()
