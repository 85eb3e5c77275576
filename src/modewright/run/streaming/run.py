# SPDX-License-Identifier: Apache-2.0
"""``stream_model``: optimize a model that is larger than memory, one unit after another."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from modewright.modes.parts import Part, finish_checkpoint
from modewright.modes.planning import Plan
from modewright.modes.state import ModeRecord, ModeState, state_of
from modewright.modes.storage import MANIFEST_NAME
from modewright.quantization.size import packed_bytes
from modewright.recipes.schema import SELF
from modewright.run.data import CalibrationData, load_calibration
from modewright.run.planning import plan_recipe
from modewright.run.progress import Progress, require_replaceable
from modewright.run.result import Result
from modewright.run.stages import Run, skipped_of
from modewright.run.streaming.chains import Chains
from modewright.run.streaming.conversion import Conversion, Weights
from modewright.run.streaming.kept import KeptParts
from modewright.run.streaming.support import Steps
from modewright.run.streaming.units import Units
from modewright.run.subject import Subject

VERIFIED = "this process: the log onto a model without weights, each tensor by its SHA-256"


def stream_model(
    run: Run,
    model: object,
    output: Path | None,
    calibration: object = None,
    evaluation: object = None,
) -> Result:
    """Optimize a folder of safetensors shards without ever holding the whole model.

    Args:
        run: The recipe, the registry, and whom to tell.
        model: The folder of a Hugging Face model.
        output: The folder to write.
        calibration: Batches; overrides the recipe's data.
        evaluation: Nothing: it is there so that what cannot be measured is refused.

    Returns:
        A result whose ``model`` has all modes and no weights, and which measures no quality.

    Raises:
        ConfigError: The recipe cannot be applied block by block, or there is no output.
        DataError: The folder is not one that can be streamed, or there is no data.
        CheckpointError: A file is damaged, or what was written is not what was meant.
        ApplyModeError: A mode failed.
    """
    if output is None:
        raise ConfigError("Streaming writes to disk as it goes: name the folder with `output`.")
    if evaluation is not None:
        raise ConfigError(
            "evaluation: streaming never holds the whole model, so it measures no quality. Leave "
            "it out, and measure the result."
        )
    require_replaceable(output)
    steps = Steps(run.recipe, run.registry)
    with run.timed("load"):
        source = _Source.open(model)
        whole = _quantized(source, steps, run)
        source.check()
    data = _data(run, steps, source, whole, calibration)
    progress = Progress(output, _fingerprint(run, source, data))
    with progress.result_folder() as folder:
        kept = KeptParts(progress.parts_folder, folder)
        chains = Chains(progress.parts_folder)
        batches = None if data is None else data.batches()
        convert = Conversion(source, steps, whole, run.registry, kept, chains, folder, batches)
        with run.timed("blocks"):
            parts = convert.convert_all(partial(run.on_progress, "blocks"))
        with run.timed("save"):
            state = _united(parts, whole, run)
            manifest = finish_checkpoint(folder, state, parts)
            hf.save_assets(source.units.skeleton, source.tokenizer, folder)
        with run.timed("restore"):
            optimized = _restored(source.units.skeleton, state, manifest, folder)
            size = verify(folder, registry=run.registry).bytes
        result = _result(run, source, optimized, output, size, data)
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
        _needing_data(run, steps, _quantized(source, steps, run), None)
    return found


@dataclass(frozen=True)
class _Source(Weights):
    """What is streamed: the files, and the model that they are of, without weights."""

    folder: Path
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
        return cls(units, shards, folder, hf.load_tokenizer(folder))

    def check(self) -> None:
        """Check that the files hold every tensor of the model."""
        self.shards.check({t.names[0]: (t.names, t.shape) for t in self.units.stored})

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.units.stored)


def _quantized(source: _Source, steps: Steps, run: Run) -> nn.Module:
    """Return the model without weights, with its quantizers: what all units must come to.

    Raises:
        ConfigError: A mode could not be applied to one of the units.
    """
    skeleton = source.units.skeleton
    plan_recipe(skeleton, run.recipe.steps, run.registry).require_ok()
    first = (steps.modes[0], steps.configs[0])
    whole = apply_mode(copy.deepcopy(skeleton), first, registry=run.registry, atomic=False)
    steps.check_units(source.units, whole)
    return whole


def _needing_data(run: Run, steps: Steps, whole: nn.Module, calibration: object) -> list[str]:
    """Return the modes that look at data.

    Raises:
        ConfigError: The data is text that the whole model would have to write.
    """
    needing = steps.needing_data(whole)
    if needing and calibration is None and SELF in run.recipe.calibration.windows_of:
        raise ConfigError(
            f"{run.recipe.place('calibration', 'source')}: {', '.join(needing)} look at text that "
            f"the model writes ({SELF!r}), for which all of it is needed at once. When streaming, "
            "name another source, such as 'builtin' or a file."
        )
    return needing


def _data(
    run: Run, steps: Steps, source: _Source, whole: nn.Module, calibration: object
) -> CalibrationData | None:
    """Return what modes look at; ``None`` if no mode of the recipe needs data.

    Raises:
        DataError: There is none, or it is a function, which runs the whole model.
    """
    needing = _needing_data(run, steps, whole, calibration)
    if not needing:
        return None
    with run.timed("data"):
        subject = Subject(source.units.skeleton, str(source.folder), source.tokenizer, None, None)
        data = load_calibration(run.recipe, subject, calibration)
    if data is None or not data.batches():
        raise DataError(
            f"{', '.join(needing)} of this recipe look at calibration data, and there is none: "
            "pass batches of token ids."
        )
    return data


def _fingerprint(run: Run, source: _Source, data: CalibrationData | None) -> str:
    """Return a digest of everything that decides what comes out."""
    parts = {
        "recipe": run.recipe.model_dump(mode="json"),
        "source": source.shards.digest(),
        "calibration": None if data is None else data.fingerprint,
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
    order = {name: index for index, (name, _) in enumerate(whole.named_modules())}
    return ModeState((expected, *(_in_order(record, order) for record in merged.records[1:])))


def _in_order(record: ModeRecord, order: Mapping[str, int]) -> ModeRecord:
    """Return a record whose lists of modules are in the order of the model, not of its units."""
    metadata = {
        key: sorted(value, key=order.__getitem__)
        if isinstance(value, list) and all(isinstance(v, str) and v in order for v in value)
        else value
        for key, value in record.metadata.items()
    }
    return replace(record, metadata=metadata)


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


def _result(
    run: Run,
    source: _Source,
    model: nn.Module,
    output: Path,
    size: int,
    data: CalibrationData | None,
) -> Result:
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
        calibration=None if data is None else data.fingerprint,
    )
