# SPDX-License-Identifier: Apache-2.0
"""Text that a model wrote for its calibration, kept until the run is done.

Writing takes minutes, and the same model with the same settings writes the same text. So it lies
beside the progress of a run, where a run with another recipe for the same output finds it too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modewright._version import __version__
from modewright.modes.codec import dumps
from modewright.modes.storage import replace_file
from modewright.recipes.schema import SELF, TextData

FILE = "text.safetensors"


class KeptText:
    """Windows of calibration text beside the progress of a run.

    Args:
        output: The folder that the run is to make; ``None`` keeps nothing.
        text: What the recipe says of the text.
        marks: Digests of all else that the windows follow from: the model, and text that was found.
    """

    def __init__(self, output: Path | None, text: TextData, marks: Sequence[str]) -> None:
        self._file = None if output is None else partial_folder(output) / FILE
        parts = [text.model_dump(mode="json"), list(marks), __version__, torch.__version__]
        self._key = hashlib.sha256(dumps(parts).encode()).hexdigest()

    def read(self) -> torch.Tensor | None:
        """Return the windows, int64 ``[n, length]``; ``None`` if they are not there, or others."""
        if self._file is None:
            return None
        try:
            with safe_open(self._file, "pt") as file:
                opened: Any = file
                if (opened.metadata() or {}).get("key") != self._key:
                    return None
                windows: torch.Tensor = opened.get_tensor("windows")
                return windows.clone()
        except (OSError, SafetensorError):  # nothing is lost but time
            return None

    def keep(self, windows: torch.Tensor) -> None:
        """Write the windows."""
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        tensors, key = {"windows": windows.contiguous()}, {"key": self._key}
        replace_file(self._file, lambda temporary: save_file(tensors, temporary, key))


def partial_folder(output: Path) -> Path:
    """Return where a run keeps its progress until the output is there."""
    return output.with_name(f"{output.name}.partial")


def is_written(text: TextData) -> bool:
    """Whether a model may have to write some of the text."""
    return bool(text.augmented) or SELF in text.windows_of
