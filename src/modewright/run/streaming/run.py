# SPDX-License-Identifier: Apache-2.0
"""``stream_model``: optimize a model that is larger than memory, one unit after another."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modewright._version import __version__
from modewright.errors import ApplyModeError, ConfigError, DataError
from modewright.integrations import transformers as hf
from modewright.integrations.shards import Shards
from modewright.modes.apply import apply_mode, restore_records
from modewright.modes.checkpoint import load_weights, verify
from modewright.modes.codec import dumps
from modewright.modes.manifest import Manifest, dtype_named
from modewright.modes.merging import merge_states
from modewright.modes.parts import Part, finish_checkpoint, write_part
from modewright.modes.planning import Plan
from modewright.modes.state import ModeState, set_state, state_of
from modewright.modes.storage import MANIFEST_NAME
from modewright.quantization.config import QuantizeConfig
from modewright.quantization.planning import plan_layers
from modewright.quantization.size import packed_bytes
from modewright.run.planning import plan_recipe
from modewright.run.progress import Progress, require_replaceable
from modewright.run.result import Result
from modewright.run.stages import Run, skipped_of
from modewright.run.streaming.kept import KeptParts
from modewright.run.streaming.support import Steps
from modewright.run.streaming.units import Units

VERIFIED = "this process: the log onto a model without weights, each tensor by its SHA-256"


def stream_model(run: Run, model: object, output: Path | None) -> Result:
    """Optimize a folder of safetensors shards without ever holding the whole model.

    Args:
        run: The recipe, the registry, and whom to tell.
        model: The folder of a Hugging Face model.
        output: The folder to write.

    Returns:
        A result whose ``model`` has all modes and no weights, and which measures no quality.

    Raises:
        ConfigError: The recipe cannot be applied block by block, or there is no output.
        DataError: The folder is not one that can be streamed.
        CheckpointError: A file is damaged, or what was written is not what was meant.
        ApplyModeError: A mode failed.
    """
    if output is None:
        raise ConfigError("Streaming writes to disk as it goes: name the folder with `output`.")
    require_replaceable(output)
    steps = Steps(run.recipe, run.registry)
    with run.timed("load"):
        source = _Source.open(model)
        whole = _quantized(source.units.skeleton, steps, run)
        _require_no_data(steps, whole)
        source.check()
    progress = Progress(output, _fingerprint(run, source))
    with progress.result_folder() as folder:
        kept = KeptParts(progress.parts_folder, folder)
        with run.timed("blocks"):
            parts = _Streaming(run, source, steps, kept, folder).convert_all()
        with run.timed("save"):
            state = _united(parts, whole, run)
            manifest = finish_checkpoint(folder, state, parts)
            hf.save_assets(source.units.skeleton, source.tokenizer, folder)
        with run.timed("restore"):
            optimized = _restored(source.units.skeleton, state, manifest, folder)
            size = verify(folder, registry=run.registry).bytes
        result = _result(run, source, optimized, output, size)
        progress.keep_result(result)
        progress.publish()
    return result


def plan_stream(run: Run, model: object) -> Plan:
    """Say what :func:`stream_model` would do; no weight is read.

    Raises:
        ConfigError: The recipe cannot be applied block by block.
        DataError: The folder is not one that can be streamed.
    """
    steps = Steps(run.recipe, run.registry)
    with run.timed("load"):
        source = _Source.open(model)
    found = plan_recipe(source.units.skeleton, run.recipe.steps, run.registry)
    if found.ok:
        _require_no_data(steps, _quantized(source.units.skeleton, steps, run))
    return found


@dataclass(frozen=True)
class _Source:
    """What is streamed: the files, and the model that they are of, without weights."""

    folder: Path
    shards: Shards
    units: Units
    tokenizer: object

    @classmethod
    def open(cls, model: object) -> _Source:
        folder = Path(model) if isinstance(model, (str, Path)) else None
        if folder is None or not folder.is_dir() or (folder / MANIFEST_NAME).is_file():
            raise DataError(
                f"{str(model)!r} cannot be streamed: expected the folder of a Hugging Face model "
                "with safetensors files, to which no mode was applied. Leave streaming out for "
                "others."
            )
        shards = Shards(folder)
        units = Units(hf.build_from_config(folder, dtype=torch.float32))
        return cls(folder, shards, units, hf.load_tokenizer(folder))

    def check(self) -> None:
        """Check that the files hold every tensor of the model."""
        self.shards.check({t.names[0]: (t.names, t.shape) for t in self.units.stored})

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.units.stored)


@dataclass(frozen=True)
class _Streaming:
    """The units of a model, converted one after the other."""

    run: Run
    source: _Source
    steps: Steps
    kept: KeptParts
    folder: Path

    def convert_all(self) -> list[Part]:
        names = self.source.units.names
        parts = []
        for index, name in enumerate(names):
            part = self.kept.load(index)
            if part is None:
                part = self._convert(index, name, len(names))
                self.kept.keep(index, part)
            parts.append(part)
            self.run.on_progress("blocks", index + 1, len(names))
        return parts

    def _convert(self, index: int, name: str, total: int) -> Part:
        """Read, convert and write one unit."""
        shell = self.source.units.shell(name)
        pairs = self.steps.for_shell()
        touched = plan_layers(shell, QuantizeConfig.model_validate(pairs[0][1])).schemes
        self.source.units.fill(shell, self.source.shards)
        if touched:
            try:
                shell = apply_mode(shell, pairs, registry=self.run.registry, atomic=False)
            except ApplyModeError as error:
                where = f"{name}: {error}"
                raise ApplyModeError(where, mode=error.mode, index=error.index) from error
            set_state(shell, self.steps.as_recorded(state_of(shell) or ModeState()))
        return write_part(
            self.folder, f"modewright-{index + 1:05}-of-{total:05}.safetensors", shell
        )


def _quantized(skeleton: nn.Module, steps: Steps, run: Run) -> nn.Module:
    """Return the model without weights, with its quantizers: what all units must come to."""
    plan_recipe(skeleton, run.recipe.steps, run.registry).require_ok()
    first = (steps.modes[0], steps.configs[0])
    return apply_mode(copy.deepcopy(skeleton), first, registry=run.registry, atomic=False)


def _require_no_data(steps: Steps, whole: nn.Module) -> None:
    needing = steps.needing_data(whole)
    if needing:
        raise ConfigError(
            f"{', '.join(needing)} of this recipe look at calibration data, which streaming does "
            "not bring. Without data: max_calibrate with dynamic activations, hqq, mse with "
            "`importance: false`, hadamard, export_quantize, compress."
        )


def _fingerprint(run: Run, source: _Source) -> str:
    """Return a digest of everything that decides what comes out."""
    parts = {
        "recipe": run.recipe.model_dump(mode="json"),
        "source": source.shards.digest(),
        "versions": [__version__, torch.__version__],
        "streamed": True,
    }
    return hashlib.sha256(dumps(parts).encode()).hexdigest()


def _united(parts: Sequence[Part], whole: nn.Module, run: Run) -> ModeState:
    """Return the log of the whole model.

    Raises:
        ApplyModeError: The units do not make up the whole.
    """
    merged = merge_states([part.state(run.registry, where="a unit") for part in parts])
    expected = (state_of(whole) or ModeState()).records[0]
    found = merged.records[0].metadata["layers"] if len(merged) else {}
    if found != expected.metadata["layers"]:
        raise ApplyModeError(
            "The units of the model were quantized in another way than the whole model would be: "
            f"{len(found)} layers, {len(expected.metadata['layers'])} expected."
        )
    return ModeState((expected, *merged.records[1:]))


def _restored(skeleton: nn.Module, state: ModeState, manifest: Manifest, folder: Path) -> nn.Module:
    """Restore what was written onto the model without weights: names, shapes and dtypes fit.

    Raises:
        CheckpointError: They do not.
    """
    model = restore_records(copy.deepcopy(skeleton), state, atomic=False)
    tensors = {
        name: torch.empty(entry.shape, dtype=dtype_named(entry.dtype), device="meta")
        for name, entry in manifest.tensors.items()
    }
    load_weights(model, tensors, manifest.aliases, where=str(folder))
    return model


def _result(run: Run, source: _Source, model: nn.Module, output: Path, size: int) -> Result:
    records = (state_of(model) or ModeState()).records
    return Result(
        model=model,
        recipe=run.recipe.name,
        source=str(source.folder),
        output=output,
        steps=tuple(run.steps),
        size_before=source.bytes,
        size_after=size,
        packed_size=packed_bytes(model, records[0].metadata["layers"]),
        baseline=None,
        optimized=None,
        kl_divergence=None,
        restored_identical=True,
        restored_in=VERIFIED,
        skipped=skipped_of(model),
        checks=(),
        calibration=None,
    )
