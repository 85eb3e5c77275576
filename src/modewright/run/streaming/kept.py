# SPDX-License-Identifier: Apache-2.0
"""What is on disk while a model is streamed: the files of finished units, and what is in them."""

from __future__ import annotations

from pathlib import Path

from modewright.errors import CheckpointError
from modewright.modes.parts import Part, is_whole
from modewright.modes.storage import replace_text


class KeptParts:
    """The finished units of a run, from which an interrupted one goes on.

    Args:
        folder: Where one JSON file lies for every finished unit.
        result: The folder with their tensors.
    """

    def __init__(self, folder: Path, result: Path) -> None:
        self._folder, self._result = folder, result
        folder.mkdir(parents=True, exist_ok=True)
        result.mkdir(parents=True, exist_ok=True)

    def load(self, index: int) -> Part | None:
        """Return a finished unit; ``None`` if it is not there or not whole, byte by byte."""
        path = self._path(index)
        try:
            part = Part.loads(path.read_bytes(), str(path))
        except (OSError, CheckpointError):
            return None
        return part if is_whole(self._result, part) else None

    def keep(self, index: int, part: Part) -> None:
        """Note that a unit is finished; its tensors are on disk already."""
        replace_text(self._path(index), part.dumps())

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:05}.json"
