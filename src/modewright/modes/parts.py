# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is written part by part, so that no more than one part is in memory.

Every part is a module with the same paths as in the whole model, and becomes one file. When all are
there, :func:`finish_checkpoint` writes the manifest over them, and the folder is an ordinary
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from modewright.errors import ApplyModeError, CheckpointError
from modewright.modes.checkpoint import describe, is_plain, sizes_of
from modewright.modes.digests import checked_tensors
from modewright.modes.manifest import METADATA_PREFIX, Manifest
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import ModeState, parse_state, state_of
from modewright.modes.storage import MANIFEST_NAME, replace_text, write_index, write_shard


@dataclass(frozen=True)
class Part:
    """One written part: the manifest of its file, whose state is the log of this part alone."""

    manifest: Manifest

    def dumps(self) -> str:
        """Return it as JSON text that carries its own digest."""
        return self.manifest.dumps()

    @classmethod
    def loads(cls, text: str | bytes, where: str) -> Part:
        """Read what :meth:`dumps` wrote.

        Raises:
            CheckpointError: It is damaged.
        """
        return cls(Manifest.loads(text, where))

    def state(self, registry: ModeRegistry, *, where: str) -> ModeState:
        """Return the log of this part.

        Raises:
            CheckpointError: It is damaged, or names an unknown mode.
        """
        return parse_state(self.manifest.state, registry, where=where)


def write_part(folder: Path, file: str, module: nn.Module) -> Part:
    """Write the tensors of one part; the file is whole or not there.

    Args:
        folder: The folder of the checkpoint.
        file: Name of the file.
        module: The part, with its log.

    Raises:
        CheckpointError: It cannot be written.
        ApplyModeError: A mode recorded tensors, which belong to no part.
    """
    state = (state_of(module) or ModeState()).for_saving(module)
    manifest, tensors = describe(module, state)
    if any(name.startswith(METADATA_PREFIX) for name in tensors):
        raise ApplyModeError(
            "A mode recorded tensors beside those of the model, which cannot be united over the "
            "parts of a model: apply it to the whole model."
        )
    entries = {name: replace(entry, file=file) for name, entry in manifest.tensors.items()}
    try:
        if tensors:
            write_shard(folder / file, tensors)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / file} could not be written: {error}") from error
    return Part(Manifest(state=manifest.state, tensors=entries, aliases=manifest.aliases))


def is_whole(folder: Path, part: Part) -> bool:
    """Whether the file of a part is there, and every byte of it is what was written."""
    try:
        checked_tensors(folder, part.manifest, keep=lambda name: False)
    except CheckpointError:
        return False
    return True


def finish_checkpoint(folder: Path, state: ModeState, parts: Sequence[Part]) -> Manifest:
    """Write the manifest of all parts; with that the folder is a checkpoint.

    Args:
        folder: The folder with the files of the parts.
        state: The log of the whole model.
        parts: All parts.

    Raises:
        CheckpointError: Two parts hold a tensor of the same name, or the folder cannot be written.
    """
    tensors: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    for part in parts:
        for name in part.manifest.weight_names:
            if name in tensors or name in aliases:
                raise CheckpointError(f"Two parts of {folder} hold the tensor {name!r}.")
        tensors.update(part.manifest.tensors)
        aliases.update(part.manifest.aliases)
    manifest = Manifest(state=state.to_dict(), tensors=tensors, aliases=aliases)
    try:
        replace_text(folder / MANIFEST_NAME, manifest.dumps())
        if is_plain(state):
            write_index(folder, manifest, sum(sizes_of(manifest).values()))
    except OSError as error:
        raise CheckpointError(f"The checkpoint {folder} could not be written: {error}") from error
    return manifest
