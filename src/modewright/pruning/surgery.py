# SPDX-License-Identifier: Apache-2.0
"""Cutting units out of a network: the same modules with smaller tensors.

Tensors are replaced, never written into; tied ones stay tied. What layers note of their own shapes
(``out_features``, ``groups`` ...) follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from modewright.errors import ConfigError
from modewright.pruning.graph.groups import DimensionGroup

Kept = Mapping[str, Sequence[int]]
"""By the name of a group the units that stay, in rising order."""


def keep(model: nn.Module, groups: Iterable[DimensionGroup], kept: Kept) -> None:
    """Cut a network down to the given units, in place.

    Args:
        model: The network that the groups were traced in.
        groups: All its groups.
        kept: By group name the units that stay; groups that are not named stay whole.

    Raises:
        ConfigError: A group is unknown, or its units are not rising numbers of units that exist.
    """
    found = {group.name: group for group in groups}
    chosen = {name: _checked(found, name, units) for name, units in kept.items()}
    chosen = {name: units for name, units in chosen.items() if len(units) < found[name].size}
    doomed: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, units in chosen.items():
        gone = torch.ones(found[name].size, dtype=torch.bool)
        gone[torch.tensor(units)] = False
        for piece in found[name].slices:
            doomed[piece.tensor][piece.axis].append(piece.indices[gone].reshape(-1))
    cut_tensors(model, doomed)
    for name, units in chosen.items():
        for attribute in found[name].attributes:
            module: Any = model.get_submodule(attribute.module)
            less = attribute.per_unit * (found[name].size - len(units))
            setattr(module, attribute.name, getattr(module, attribute.name) - less)
    for name, units in chosen.items():  # last: paths of other groups may lead through these lists
        _cut_lists(model, found[name], units)


def _checked(groups: Mapping[str, DimensionGroup], name: str, units: Sequence[int]) -> list[int]:
    if name not in groups:
        raise ConfigError(
            f"There is no group {name!r} in this model. Known: {', '.join(groups) or 'none'}."
        )
    chosen = [int(unit) for unit in units]
    size = groups[name].size
    rising = all(a < b for a, b in pairwise(chosen))
    if not chosen or not rising or chosen[0] < 0 or chosen[-1] >= size:
        raise ConfigError(
            f"The units to keep of group {name!r} must be rising numbers from 0 to {size - 1}, at "
            f"least one; received {chosen[:8]}{' ...' if len(chosen) > 8 else ''}."
        )
    return chosen


def cut_tensors(
    model: nn.Module, doomed: Mapping[str, Mapping[int, Sequence[torch.Tensor]]]
) -> None:
    """Remove indices of tensors, given by path and axis, wherever these tensors are used."""
    named = dict([*model.named_parameters(), *model.named_buffers()])
    smaller: dict[int, torch.Tensor] = {}
    for path, axes in doomed.items():
        old = named[path]
        new = old.detach()
        for axis, removed in axes.items():
            stay = torch.ones(new.shape[axis], dtype=torch.bool)
            stay[torch.cat(list(removed))] = False
            new = new.index_select(axis, stay.nonzero().reshape(-1).to(new.device))
        smaller[id(old)] = _like(old, new)
    for module in model.modules():
        before = {name: tuple(t.shape) for name, t in module._parameters.items() if t is not None}
        touched = False
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None and id(tensor) in smaller:
                    members[name] = smaller[id(tensor)]  # type: ignore[assignment]
                    touched = True
        if touched:
            follow_shapes(module, before)


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    new = new.contiguous()
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def follow_shapes(module: Any, before: Mapping[str, tuple[int, ...]]) -> None:
    """Bring the numbers that a layer keeps of its own shapes up to date.

    Args:
        module: The layer, its tensors already cut.
        before: The shapes that its parameters had.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        _follow_convolution(module, weight, before["weight"])
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = len(weight)
        module.num_channels = len(weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif type(module).__name__ == "Conv1D":  # of Transformers: a linear layer, transposed
        module.nx, module.nf = weight.shape


def _follow_convolution(
    module: nn.modules.conv._ConvNd, weight: torch.Tensor, before: tuple[int, ...]
) -> None:
    made, taken = (1, 0) if module.transposed else (0, 1)
    if module.groups > 1 and before[1] == 1:  # depthwise: a group for each channel
        module.groups = module.groups * weight.shape[0] // before[0]
    module.out_channels = weight.shape[made] * (module.groups if module.transposed else 1)
    module.in_channels = weight.shape[taken] * (1 if module.transposed else module.groups)


def silence(model: nn.Module, groups: Iterable[DimensionGroup], kept: Kept) -> None:
    """Set to zero what takes in the units that are not kept; all shapes stay.

    Where a group is exact, the network then computes what it computes without these units.
    """
    named = dict([*model.named_parameters(), *model.named_buffers()])
    quiet: dict[int, torch.Tensor] = {}
    for group in groups:
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[torch.tensor(list(kept.get(group.name, range(group.size))))] = False
        for piece in group.consumers:
            old = named[piece.tensor]
            new = quiet.get(id(old), old).detach().clone()
            new.index_fill_(piece.axis, piece.indices[gone].reshape(-1).to(new.device), 0)
            quiet[id(old)] = _like(old, new)
    replace_tensors(model, quiet)


def replace_tensors(model: nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Put other tensors in the place of parameters and buffers, which are given by ``id``."""
    for module in model.modules():
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None and id(tensor) in new:
                    members[name] = new[id(tensor)]  # type: ignore[assignment]


def _cut_lists(model: nn.Module, group: DimensionGroup, units: Sequence[int]) -> None:
    for path in group.modules:
        old = model.get_submodule(path)
        members = list(old.children())
        new = nn.ModuleList(members[unit] for unit in units).train(old.training)
        model.set_submodule(path, new)
