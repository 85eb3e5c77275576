# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind while it works, so that a killed one goes on where it stopped.

Beside the output ``DIR`` lies ``DIR.partial`` until the run has finished: ``progress.json``, the
original model's predictions, the model after the last mode worth keeping, the result that is being
written, and text that the model wrote (`kept_text`). The output itself appears in one rename.
Progress of another run (another model, recipe, data or version) is discarded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from modewright.errors import CheckpointError, ConfigError
from modewright.evaluation.language import LanguageQuality
from modewright.modes.checkpoint import restore, save
from modewright.modes.codec import dumps
from modewright.modes.registry import ModeRegistry
from modewright.modes.storage import MANIFEST_NAME, replace_file, replace_text
from modewright.run.kept_text import FILE, partial_folder
from modewright.run.quality import Baseline
from modewright.run.result import Result, StepResult

# A mode that took less than this is done again faster than the model is written and read.
WORTH_KEEPING_SECONDS = 10.0


class Progress:
    """The progress of one run.

    Args:
        output: The folder that the run is to make; ``None`` for a run that keeps nothing.
        fingerprint: Digest of everything that decides what the run does.

    Raises:
        ConfigError: The output is there and not modewright's to replace.
    """

    def __init__(self, output: Path | None, fingerprint: str) -> None:
        self._output = output
        self._unsaved_seconds = 0.0
        self.finished_steps = 0
        self.steps: list[StepResult] = []
        self._data: dict[str, Any] = {"fingerprint": fingerprint}
        if output is None:
            return
        require_replaceable(output)
        self._folder = partial_folder(output)
        replaced = self._folder / "replaced"
        if replaced.exists() and not output.exists():  # killed between the two renames
            replaced.rename(output)
        known = self._read()
        if known.get("fingerprint") != fingerprint:
            self._discard()
            self._write()
        else:
            self._data = known
            self.finished_steps = known.get("finished_steps", 0)
            steps = [StepResult(**{**step, "resumed": True}) for step in known.get("steps", ())]
            self.steps = steps

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left something to go on from."""
        return len(self._data) > 1

    def blocks_folder(self, step: int) -> Path | None:
        """Return where a step may keep its finished blocks until the model after it is kept."""
        return None if self._output is None else self._folder / "blocks" / str(step)

    @property
    def parts_folder(self) -> Path:
        """Where a run that writes its result part by part notes what is in each.

        Raises:
            ConfigError: The run has no output.
        """
        if self._output is None:
            raise ConfigError("A run without an output keeps no parts: name a folder to write.")
        return self._folder / "parts"

    @contextmanager
    def result_folder(self) -> Iterator[Path]:
        """Lend the folder in which the output is put together; a temporary one without output."""
        if self._output is not None:
            yield self._folder / "result"
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "result"

    def baseline(self) -> Baseline | None:
        """Return what an earlier run measured of the original model."""
        if self._output is None or "baseline" not in self._data:
            return None
        try:
            reference = load_file(self._folder / "reference.safetensors")["reference"]
        except (OSError, SafetensorError, KeyError):
            return None
        known = self._data["baseline"]
        language = None if known is None else LanguageQuality(**known)
        return Baseline(language, reference.clone())

    def keep_baseline(self, found: Baseline) -> None:
        """Write what was measured of the original model."""
        if self._output is None:
            return
        path = self._folder / "reference.safetensors"
        replace_file(path, lambda temporary: save_file({"reference": found.reference}, temporary))
        self._data["baseline"] = None if found.language is None else asdict(found.language)
        self._write()

    def restored(self, model: nn.Module, registry: ModeRegistry) -> nn.Module:
        """Return the model as the last kept step left it; as it is if that is gone or damaged."""
        if not self.finished_steps:
            return model
        try:
            return restore(model, self._folder / "modes", registry=registry)
        except CheckpointError:  # nothing is lost but time: the steps are done again
            self.finished_steps, self.steps = 0, []
            return model

    def keep_step(self, model: nn.Module, finished: int, steps: list[StepResult]) -> None:
        """Write the model after ``finished`` of the recipe's steps, if redoing them takes long."""
        self._unsaved_seconds += steps[-1].seconds
        if self._output is None or self._unsaved_seconds < WORTH_KEEPING_SECONDS:
            return
        save(model, self._folder / "modes")
        self._unsaved_seconds = 0.0
        self._data["finished_steps"] = finished
        self._data["steps"] = [asdict(step) for step in steps]
        self._write()
        shutil.rmtree(self._folder / "blocks", ignore_errors=True)

    def keep_result(self, result: Result) -> None:
        """Write what came out beside the model."""
        if self._output is not None:
            replace_text(self._folder / "result" / "result.json", dumps(result.to_dict()))

    def publish(self) -> None:
        """Put the finished result in the place of the output, and drop the rest."""
        if self._output is None:
            return
        old = self._folder / "replaced"
        if self._output.exists():
            self._output.rename(old)
        (self._folder / "result").rename(self._output)
        shutil.rmtree(self._folder)

    def _discard(self) -> None:
        """Remove what another run left, but for text: that says itself for which runs it is."""
        for left in self._folder.iterdir() if self._folder.is_dir() else ():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif left.name != FILE:
                left.unlink()
        self._folder.mkdir(parents=True, exist_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads((self._folder / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def _write(self) -> None:
        replace_text(self._folder / "progress.json", json.dumps(self._data, indent=1))


def require_replaceable(output: Path | None) -> None:
    """Check that an output folder is new, empty, or an earlier output.

    Raises:
        ConfigError: It holds something else.
    """
    if output is None or not output.exists():
        return
    if output.is_dir() and (output / MANIFEST_NAME).is_file():
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    raise ConfigError(
        f"The output {output} exists and was not written by modewright, so it is not replaced. "
        "Name another folder, or move that one away."
    )
