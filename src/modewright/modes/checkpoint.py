# SPDX-License-Identifier: Apache-2.0
"""Saving a converted model and restoring it: state and weights in one checkpoint.

``save`` writes what ``restore`` needs to turn an unmodified model into the converted one, exactly:
the log of modes and every tensor, with a digest of each. ``restore`` reads and checks all of it
before it touches the model, and puts the model back if something still does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.errors import ApplyModeError, CheckpointError
from modewright.modes.apply import restore_records
from modewright.modes.codec import join_tensors, split_tensors
from modewright.modes.digests import checked_tensors
from modewright.modes.empty import has_lost_buffers, parameters_on_meta
from modewright.modes.garbage import uncollected
from modewright.modes.manifest import (
    METADATA_PREFIX,
    Manifest,
    TensorEntry,
    dtype_named,
    migrate,
    tensor_digest,
)
from modewright.modes.model_like import ModelLike, all_modules, as_model, rewrapped, unwrap
from modewright.modes.registry import ModeRegistry
from modewright.modes.sequence import Position
from modewright.modes.snapshot import Snapshot
from modewright.modes.state import ModeState, parse_state, require_state_at_root, state_of
from modewright.modes.storage import Tensors, read_manifest, read_tensors, write_checkpoint
from modewright.modes.traits import NEEDS_RESTORE

_NOT_STORABLE = (torch.complex32, torch.complex128)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint or a model holds, as far as can be told without running it.

    Attributes:
        source: The path, or the model's class.
        modewright_version: The version that wrote it.
        modes: Name, config and metadata of every recorded mode, oldest first.
        provenance: How each record came about, in the same order.
        tensors: Number of stored tensors; tied ones count once.
        bytes: Bytes of these tensors.
        bytes_by_dtype: The same by dtype.
        tied: Names of tied tensors and the name under which each is stored.
    """

    source: str
    modewright_version: str
    modes: tuple[dict[str, Any], ...]
    provenance: tuple[dict[str, Any], ...]
    tensors: int
    bytes: int
    bytes_by_dtype: dict[str, int]
    tied: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The outcome of a verification that found nothing wrong.

    Attributes:
        path: The checkpoint.
        modes: Names of the recorded modes.
        tensors: Number of tensors whose digest was recomputed.
        bytes: Their bytes.
    """

    path: Path
    modes: tuple[str, ...]
    tensors: int
    bytes: int


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a checkpoint; see :func:`modewright.save`."""
    root, _ = unwrap(model)
    require_state_at_root(root, all_modules(root))
    state = (state_of(root) or ModeState()).for_saving(root)
    manifest, tensors = describe(root, state)
    write_checkpoint(Path(path), manifest, tensors, plain=is_plain(state))
    return Path(path)


def restore(
    model: object, path: str | Path, *, registry: ModeRegistry, verify: bool = True
) -> nn.Module:
    """Restore a checkpoint onto an unmodified model; see :func:`modewright.restore`."""
    with uncollected():
        return _restored(model, Path(path), registry, verify)


def _restored(model: object, where: Path, registry: ModeRegistry, verify: bool) -> nn.Module:
    root, holder = as_model(model), None
    if isinstance(root, nn.Module):
        root, holder = unwrap(root)
    manifest = read_manifest(where)
    tensors = checked_tensors(where, manifest) if verify else dict(read_tensors(where, manifest))
    data = join_tensors(manifest.state, tensors, f"The state of {where}", error=CheckpointError)
    state = parse_state(data, registry, where=str(where))
    weights = {n: t for n, t in tensors.items() if not n.startswith(METADATA_PREFIX)}
    modules = all_modules(root) if isinstance(root, nn.Module) else []
    values = any(record.descriptor.writes_in_place for record in state)
    with Snapshot(modules, values=values, enabled=bool(modules)):
        try:
            restored = _replayed(root, state)
        except ApplyModeError as error:
            raise CheckpointError(
                f"{where} does not fit this model, which is as it was: mode {error.mode!r} could "
                f"not be restored: {type(error.cause).__name__}: {error.cause}"
            ) from error
        load_weights(restored, weights, manifest.aliases, where=str(where))
    return rewrapped(holder, restored)


def _replayed(root: nn.Module | ModelLike, state: ModeState) -> nn.Module:
    """Return the model with all modes restored; of a model-like, parameters without memory.

    A class that needs the values of its parameters to be built gets them.
    """
    if isinstance(root, ModelLike):
        try:
            with parameters_on_meta():
                empty = restore_records(root, state, atomic=False)
        except (ApplyModeError, NotImplementedError, RuntimeError):
            pass  # if it fails with real parameters too, that error is the one to show
        else:
            if not has_lost_buffers(empty):
                return empty
    return restore_records(root, state, atomic=False)


def restore_from_mode_state(model: object, state: object, *, registry: ModeRegistry) -> nn.Module:
    """Replay a mode state, no weights; see :func:`modewright.restore_from_mode_state`."""
    root, holder = as_model(model), None
    if isinstance(root, nn.Module):
        root, holder = unwrap(root)
    if isinstance(state, Mapping) and "schema_version" in state:
        body = {"schema_version": state["schema_version"], "state": dict(state)}
        state = migrate(body, "The mode state")["state"]
    return rewrapped(holder, restore_records(root, parse_state(state, registry, where="The state")))


def verify(path: str | Path, *, registry: ModeRegistry) -> Verification:
    """Check every byte of a checkpoint; see :func:`modewright.verify`."""
    where = Path(path)
    manifest = read_manifest(where)
    tensors = checked_tensors(
        where, manifest, keep=lambda name: name.startswith(METADATA_PREFIX)
    )  # of weights no more than a few are in memory
    data = join_tensors(manifest.state, tensors, f"The state of {where}", error=CheckpointError)
    state = parse_state(data, registry, where=str(where))
    return Verification(
        path=where,
        modes=tuple(record.name for record in state),
        tensors=len(manifest.tensors),
        bytes=sum(sizes_of(manifest).values()),
    )


def inspect(source: nn.Module | str | Path) -> Inspection:
    """Say what a checkpoint or model holds; see :func:`modewright.inspect`."""
    if isinstance(source, nn.Module):
        root, _ = unwrap(source)
        state = (state_of(root) or ModeState()).for_saving(root)
        manifest, _ = describe(root, state, digests=False)
        name = type(root).__name__
    else:
        manifest, name = read_manifest(Path(source)), str(source)
    sizes = sizes_of(manifest)
    modes, origins = manifest.state.get("modes"), manifest.state.get("provenance")
    return Inspection(
        source=name,
        modewright_version=manifest.modewright_version,
        modes=tuple(modes) if isinstance(modes, list) else (),
        provenance=tuple(origins) if isinstance(origins, list) else (),
        tensors=len(manifest.tensors),
        bytes=sum(sizes.values()),
        bytes_by_dtype=dict(sizes),
        tied=dict(manifest.aliases),
    )


def sizes_of(manifest: Manifest) -> Counter[str]:
    """Return the bytes of the stored tensors by dtype."""
    sizes: Counter[str] = Counter()
    for entry in manifest.tensors.values():
        size = dtype_named(entry.dtype).itemsize * _product(entry.shape)
        sizes[entry.dtype.removeprefix("torch.")] += size
    return sizes


def load_weights(
    model: nn.Module, weights: Tensors, aliases: dict[str, str], *, where: str
) -> None:
    """Put tensors in the place of a model's own, by the names of its state dict.

    The model's parameters and buffers are replaced, not written into; tied ones stay tied if they
    are stored as one.

    Args:
        model: The model, of the right architecture.
        weights: The stored tensors, on the CPU.
        aliases: Further names, and the stored names they stand for.
        where: Name of their source, for messages.

    Raises:
        CheckpointError: A name is missing or too much, or a shape or dtype differs.
    """
    expected = model.state_dict()
    _check_fit(expected, weights, aliases, where)
    ties = _tied_parameters(model)
    loaded = {name: _on(expected[name], tensor) for name, tensor in weights.items()}
    for alias, name in aliases.items():
        tied_here = _share_memory(expected[alias], expected[name])
        loaded[alias] = loaded[name] if tied_here else loaded[name].clone()
    try:
        model.load_state_dict(loaded, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit this model: {error}") from error
    for (owner, member), *others in ties:
        shared = owner._parameters[member]
        for module, name in others:
            own = module._parameters[name]
            if own is not None and shared is not None and own.data_ptr() == shared.data_ptr():
                module._parameters[name] = shared  # they come from one stored tensor


def describe(
    root: nn.Module, state: ModeState, *, digests: bool = True
) -> tuple[Manifest, Tensors]:
    """Return the manifest of a model and the tensors to store, on the CPU and contiguous.

    Raises:
        CheckpointError: The state dict holds something that cannot be stored.
    """
    data, metadata_tensors = split_tensors(state.to_dict(), METADATA_PREFIX)
    stored: Tensors = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in {**root.state_dict(), **metadata_tensors}.items():
        tensor = _savable(name, value)
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in names and not name.startswith(METADATA_PREFIX):
            aliases[name] = names[key]
            continue
        names[key] = name
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages:  # overlapping views: each gets its own bytes in the file
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    entries = {
        n: TensorEntry(str(t.dtype), tuple(t.shape), tensor_digest(t) if digests else "")
        for n, t in stored.items()
    }
    return Manifest(state=data, tensors=entries, aliases=aliases), stored


def _savable(name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{name!r} in the model's state dict is a {type(value).__name__}, not a tensor "
            "(get_extra_state of some module returns it). Such objects could only be saved as "
            "code to be run when loaded, which modewright refuses. Return a tensor there."
        )
    if value.is_meta:
        raise CheckpointError(
            f"{name!r} is on the meta device: it has no data to save. Load its weights first."
        )
    if value.layout is not torch.strided or value.is_quantized:
        raise CheckpointError(
            f"{name!r} is a {value.layout} tensor of {value.dtype}; only dense ones can be saved."
        )
    if value.dtype in _NOT_STORABLE:
        raise CheckpointError(
            f"{name!r} is of {value.dtype}, which safetensors cannot hold. Keep its real and "
            "imaginary parts as two buffers."
        )
    return value.detach().resolve_conj().resolve_neg()


def _check_fit(
    expected: dict[str, Any], weights: Tensors, aliases: dict[str, str], where: str
) -> None:
    names = {*weights, *aliases}
    problems = [f"  {n}: missing in the checkpoint" for n in expected if n not in names]
    problems += [f"  {n}: not in the model" for n in sorted(names) if n not in expected]
    for name in [n for n in expected if n in names]:
        theirs, own = weights[aliases.get(name, name)], expected[name]
        if not isinstance(own, torch.Tensor):
            problems.append(f"  {name}: a {type(own).__name__} in the model, which is not restored")
        elif theirs.shape != own.shape or theirs.dtype != own.dtype:
            problems.append(
                f"  {name}: {theirs.dtype} {tuple(theirs.shape)} in the checkpoint, "
                f"{own.dtype} {tuple(own.shape)} in the model"
            )
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "\n".join(problems[:8])
        raise CheckpointError(
            f"{where} does not fit this model, which is as it was:\n{listed}{more}\n"
            "Pass the same architecture, in the same dtype, that the modes were applied to."
        )


def _tied_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return the places of every parameter that lies in more than one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in all_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _on(own: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if own.is_meta else tensor.to(own.device)


def _share_memory(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors of a state dict are one; those on the meta device have no address."""
    if one.is_meta:
        return bool(one.untyped_storage()._cdata == two.untyped_storage()._cdata)
    return one.data_ptr() == two.data_ptr()


def is_plain(state: ModeState) -> bool:
    """Whether the weights alone, read by another program, are the model."""
    position = Position.after_all(record.descriptor for record in state)
    return not position.open and not (position.traits & NEEDS_RESTORE)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
