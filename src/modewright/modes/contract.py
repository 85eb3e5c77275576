# SPDX-License-Identifier: Apache-2.0
"""``check_mode``: the checks that every mode must pass, callable by anyone who writes one.

They are what the engine promises its users about *any* mode: converting is recorded and repeatable,
reading the state changes nothing, a checkpoint restores the same modules, names, dtypes and outputs
on a fresh model, and train flags survive.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.errors import ModewrightError
from modewright.modes.apply import apply_mode
from modewright.modes.checkpoint import restore, restore_from_mode_state, save
from modewright.modes.codec import dumps, split_tensors
from modewright.modes.config import ModeConfig
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import ModeState, state_of
from modewright.modes.steps import ConfigLike, ModeKwargs, Modes, split_modes

Run = Callable[[nn.Module], Any]


def check_mode(
    mode: str,
    make_model: Callable[[], nn.Module],
    run: Run,
    *,
    registry: ModeRegistry,
    config: ConfigLike = None,
    mode_kwargs: dict[str, Any] | None = None,
    before: Modes = None,
    before_kwargs: ModeKwargs = None,
) -> list[str]:
    """Put a registered mode through everything that the engine promises about modes.

    Args:
        mode: The mode's name.
        make_model: Builds the unmodified model, the same one at every call (seed it).
        run: Runs a model and returns a tensor, or a nest of tensors.
        registry: Where the mode is registered.
        config: The mode's config.
        mode_kwargs: What its ``convert`` needs besides.
        before: Modes that must come first.
        before_kwargs: What those need.

    Returns:
        What is wrong, in sentences; an empty list if nothing is.
    """
    problems = _config_problems(registry[mode].config_class)

    def converted() -> nn.Module:
        model = make_model()
        if split_modes(before):
            model = apply_mode(model, before, registry=registry, mode_kwargs=before_kwargs)
        return apply_mode(model, (mode, config), registry=registry, mode_kwargs=mode_kwargs)

    flags = {n: m.training for n, m in make_model().named_modules()}
    model = converted()
    structure = _structure(model)
    changed = [n for n, m in model.named_modules() if n in flags and flags[n] != m.training]
    if changed:
        problems.append(f"convert changed the train flag of {changed[:3]}")
    problems += _recording_problems(model, mode)
    if _bits(run(converted())) != _bits(run(model)):
        problems.append("two conversions of the same model give different outputs")
    if registry[mode].save_mode_in_state:
        try:
            for problem in _restore_problems(model, structure, make_model, run, registry):
                problems.append(problem)  # those found before an error count too
        except ModewrightError as error:
            problems.append(f"it cannot be saved and restored: {error}")
    return problems


def _config_problems(config_class: type[ModeConfig]) -> list[str]:
    problems = []
    for name, info in config_class.model_fields.items():
        if info.is_required():
            problems.append(f"config field {name!r} has no default")
        if not info.description:
            problems.append(f"config field {name!r} has no description")
    return problems


def _recording_problems(model: nn.Module, mode: str) -> list[str]:
    state = state_of(model)
    if state is None or state.records[-1].name != mode:
        return ["the mode was not recorded"]
    first, second = (_text(state.for_saving(model)) for _ in range(2))
    if first != second:
        return ["reading the state twice gives two different states"]
    if _text(state) != _text(state_of(model) or ModeState()):
        return ["reading the state changed the model's records"]
    return []


def _restore_problems(
    model: nn.Module,
    structure: Any,
    make_model: Callable[[], nn.Module],
    run: Run,
    registry: ModeRegistry,
) -> Iterator[str]:
    state = (state_of(model) or ModeState()).for_saving(model)
    rebuilt = restore_from_mode_state(make_model(), state.to_dict(), registry=registry)
    if _structure(rebuilt) != structure:
        yield "restore gives other modules, names, shapes or dtypes than convert"
    with tempfile.TemporaryDirectory() as folder:
        for path in (Path(folder) / "file.safetensors", Path(folder) / "folder"):
            save(model, path)
            restored = restore(make_model(), path, registry=registry)
            if _structure(restored) != structure:
                yield f"a restored {path.stem} has another structure than what was saved"
            if _bits(run(restored)) != _bits(run(model)):
                yield f"a restored {path.stem} gives other outputs than what was saved"


def _structure(model: nn.Module) -> Any:
    modules = [(n, type(m).__qualname__, m.training) for n, m in model.named_modules()]
    tensors = [(n, t.dtype, tuple(t.shape)) for n, t in model.state_dict().items()]
    return modules, sorted(tensors, key=lambda item: item[0])


def _text(state: ModeState) -> str:
    data, tensors = split_tensors(state.to_dict(), "state")
    return dumps(data) + str(_bits(list(tensors.values())))


def _bits(value: Any) -> Any:
    """Return a nest of tensors as a nest of bytes, to be compared exactly."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return str(value.dtype), tuple(value.shape), content
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bits(item) for item in value]
    return value
