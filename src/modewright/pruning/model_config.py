# SPDX-License-Identifier: Apache-2.0
"""Keeping the config of a Transformers model true when the model is pruned.

Which entries of a config speak of what was pruned is found by their values: a list with one entry
for each block, a number of layers that equals how many there were. That the result is right is then
proven: a model is built from it and must have the shapes of the pruned one and compute the same.

Nothing here imports transformers: a config is any object on ``model.config`` with ``to_dict``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modewright.modes.empty import parameters_on_meta

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class KeptBlocks:
    """Which blocks of one list were kept.

    Attributes:
        total: How many there were.
        places: The places that the kept ones had, ascending.
    """

    total: int
    places: tuple[int, ...]


def has_config(model: nn.Module) -> bool:
    """Whether a model carries a config of Transformers."""
    return callable(getattr(getattr(model, "config", None), "to_dict", None))


def replace_config(model: nn.Module) -> None:
    """Give a model a copy of its config, in all places that hold it, so that it can be edited.

    Edits of the copy do not reach other models with the same config, nor a roll-back. The first one
    stays as ``model.unpruned_config``: whoever saves the model needs it, to build what a record is
    restored onto.
    """
    memo: dict[int, Any] = {}
    if not hasattr(model, "unpruned_config"):
        model.unpruned_config = model.config
    copy.deepcopy(model.config, memo)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name.endswith("config") and name != "unpruned_config" and id(value) in memo:
                setattr(module, name, memo[id(value)])


def note_kept_blocks(model: nn.Module, kept: Mapping[str, KeptBlocks]) -> None:
    """Write into a model's config how many blocks it has now.

    Args:
        model: The model, after :func:`replace_config`.
        kept: By path of the list of blocks what was kept of it.
    """
    for holder, blocks in kept.items():
        config = _config_of(model, holder)
        if config is None:
            continue
        for key, value in list(_entries(config)):
            if isinstance(value, (list, tuple)) and len(value) == blocks.total:
                _set(config, key, type(value)(value[place] for place in blocks.places))
            elif type(value) is int and value == blocks.total and "layer" in key:
                _set(config, key, len(blocks.places))


def set_entries(model: nn.Module, entries: Mapping[str, int]) -> None:
    """Write numbers into a model's config (``intermediate_size`` ...)."""
    for key, value in entries.items():
        _set(model.config, key, value)


def config_problem(model: nn.Module) -> str | None:
    """Build a model from the config; return what is wrong with that, ``None`` if nothing is."""
    problem, built = _built_like(model)
    if built is None:
        return problem
    built.load_state_dict(model.state_dict(), assign=True)
    return _difference(model, built)


def shapes_problem(model: nn.Module) -> str | None:
    """Build a model from the config without weights; return which shape differs, if one does."""
    return _built_like(model)[0]


def _built_like(model: nn.Module) -> tuple[str | None, nn.Module | None]:
    try:
        with parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = type(model)(copy.deepcopy(model.config)).eval()
    except Exception as error:  # whatever a model's constructor does
        reason = f"{type(error).__name__}: {error}"
        return f"no {type(model).__name__} can be built from it: {reason}", None
    own, other = (
        {name: tuple(tensor.shape) for name, tensor in m.state_dict().items()}
        for m in (model, built)
    )
    for name in [*own, *other]:
        if own.get(name) != other.get(name):
            has, makes = own.get(name, "none"), other.get(name, "none")
            return f"{name} has the shape {has} in the model, the config makes {makes}", None
    return None, built


def _difference(model: nn.Module, built: nn.Module) -> str | None:
    """Run both models on a few tokens; return how they differ, if they do."""
    vocabulary = getattr(model.config, "vocab_size", None)
    device = next((p.device for p in model.parameters()), torch.device("meta"))
    if not isinstance(vocabulary, int) or device.type == "meta":
        return None  # not a language model, or no weights: the shapes are all that can be compared
    tokens = (torch.arange(12, device=device) * 7919 % vocabulary)[None]
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            own, other = (m(**batch).logits.float() for m in (model, built.to(device)))
    finally:
        for module, flag in flags:
            module.training = flag
    off = float((own - other).abs().max() / own.abs().max())
    if off <= _TOLERANCE:
        return None
    return f"a model that is built from the config gives other logits (by {100 * off:.2g} %)"


def _config_of(model: nn.Module, path: str) -> Any:
    """Return the config of the innermost module around a path that has one."""
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if has_config(module):
            return module.config
    return None


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a config holds, under the names that can be set."""
    for key, value in vars(config).items():
        if not key.startswith("_"):
            yield key, value


def _set(config: Any, key: str, value: int | Sequence[Any]) -> None:
    """Set one entry; checks that look at several of them at once come when a model is built."""
    config.__dict__[key] = value
