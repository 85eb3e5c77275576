# SPDX-License-Identifier: Apache-2.0
"""Cutting units out of a network: the same modules with smaller tensors.

A :class:`CutPlan` says which indices of which tensors go; it is plain data, so that a record can
hold it and do the same cut again without tracing. Tensors are replaced, never written into; tied
ones stay tied. What layers note of their own shapes (``out_features``, ``groups`` ...) follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from modewright.errors import ConfigError
from modewright.modes.model_like import all_modules
from modewright.modes.snapshot import Snapshot
from modewright.pruning.graph.groups import DimensionGroup

Kept = Mapping[str, Sequence[int]]
"""By the name of a group the units that stay, in rising order; what is not named stays whole."""


@dataclass(frozen=True)
class CutPlan:
    """What a cut does to a network.

    Attributes:
        kept: By path of a parameter or buffer (of tied ones, the first) and axis the indices that
            stay, ``[n]`` int64.
        numbers: By path of a module and attribute what is subtracted from it.
        lists: By path of a module list the places of the members that stay.
    """

    kept: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    lists: dict[str, list[int]] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Return the plan as JSON values and tensors."""
        kept = {path: {str(a): i for a, i in axes.items()} for path, axes in self.kept.items()}
        return {"kept": kept, "numbers": self.numbers, "lists": self.lists}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> CutPlan:
        """Read what :meth:`to_data` wrote."""
        kept = {path: {int(a): i for a, i in axes.items()} for path, axes in data["kept"].items()}
        return cls(kept, dict(data["numbers"]), dict(data["lists"]))

    def __bool__(self) -> bool:
        return bool(self.kept or self.lists)


def plan_cut(model: nn.Module, groups: Iterable[DimensionGroup], kept: Kept) -> CutPlan:
    """Say what keeping some units means for the tensors of a network.

    Args:
        model: The network that the groups were traced in, whole.
        groups: Its groups.
        kept: By group name the units that stay.

    Raises:
        ConfigError: A group is unknown, or its units are not rising numbers of units that exist.
    """
    found = {group.name: group for group in groups}
    chosen = {name: _checked(found, name, units) for name, units in kept.items()}
    named = dict([*model.named_parameters(), *model.named_buffers()])
    doomed: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    numbers: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    lists: dict[str, list[int]] = {}
    for name, units in chosen.items():
        group = found[name]
        if len(units) == group.size:
            continue
        gone = _missing(units, group.size)
        for piece in group.slices:
            doomed[piece.tensor][piece.axis].append(piece.indices[gone].reshape(-1))
        for attribute in group.attributes:
            numbers[attribute.module][attribute.name] += attribute.per_unit * len(gone)
        lists.update(dict.fromkeys(group.modules, units))
    stay = {
        path: {axis: _others(removed, named[path].shape[axis]) for axis, removed in axes.items()}
        for path, axes in doomed.items()
    }
    return CutPlan(stay, {module: dict(less) for module, less in numbers.items()}, lists)


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


def _missing(units: Sequence[int], size: int) -> torch.Tensor:
    return _others([torch.tensor(list(units))], size)


def _others(indices: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Return the indices of an axis that are not among the given ones."""
    left = torch.ones(size, dtype=torch.bool)
    left[torch.cat(list(indices))] = False
    return left.nonzero().reshape(-1)


def keep(model: nn.Module, groups: Iterable[DimensionGroup], kept: Kept) -> None:
    """Cut a network down to the given units, in place; see :func:`plan_cut`."""
    cut(model, plan_cut(model, groups, kept))


def cut(model: nn.Module, plan: CutPlan) -> None:
    """Cut a network as a plan says, in place.

    Raises:
        ConfigError: The plan is of another network.
    """
    named = dict([*model.named_parameters(), *model.named_buffers()])
    new: dict[int, torch.Tensor] = {}
    for path, axes in plan.kept.items():
        if path not in named or any(int(i.max()) >= named[path].shape[a] for a, i in axes.items()):
            raise ConfigError(
                f"The cut does not fit this network: it keeps indices of {path!r} that are not "
                "there. It was planned for another one, or this one was cut already."
            )
        new[id(named[path])] = _like(named[path], sliced(named[path].detach(), axes))
    replace_tensors(model, new)
    for path, numbers in plan.numbers.items():
        module: Any = model.get_submodule(path)
        for name, less in numbers.items():
            setattr(module, name, getattr(module, name) - less)
    for path, places in plan.lists.items():  # last: other paths may lead through these lists
        old = model.get_submodule(path)
        members = list(old.children())
        shorter = nn.ModuleList(members[place] for place in places)
        shorter.training = old.training
        model.set_submodule(path, shorter)


def sliced(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return a tensor with only some indices along axes; gradients flow through."""
    for axis, indices in axes.items():
        tensor = tensor.index_select(axis, indices.to(tensor.device))
    return tensor


@contextmanager
def trial_cut(model: nn.Module, plan: CutPlan) -> Iterator[None]:
    """Cut a network for a while; afterwards it has the tensors that it had."""
    snapshot = Snapshot(all_modules(model))
    try:
        cut(model, plan)
        yield
    finally:
        snapshot.roll_back()


def silence(model: nn.Module, groups: Iterable[DimensionGroup], kept: Kept) -> None:
    """Set to zero what takes in the units that are not kept; all shapes stay.

    Where a group is exact, the network then computes what it computes without these units.
    """
    named = dict([*model.named_parameters(), *model.named_buffers()])
    quiet: dict[int, torch.Tensor] = {}
    for group in groups:
        gone = _missing(kept.get(group.name, range(group.size)), group.size)
        for piece in group.consumers:
            old = named[piece.tensor]
            new = quiet.get(id(old), old).detach().clone()
            new.index_fill_(piece.axis, piece.indices[gone].reshape(-1).to(new.device), 0)
            quiet[id(old)] = _like(old, new)
    replace_tensors(model, quiet)


def replace_tensors(model: nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Put other tensors in the place of parameters and buffers, which are given by ``id``."""
    for module in model.modules():
        before = {name: tuple(t.shape) for name, t in module._parameters.items() if t is not None}
        touched = False
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None and id(tensor) in new:
                    members[name] = new[id(tensor)]  # type: ignore[assignment]
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
    if isinstance(module, nn.modules.batchnorm._NormBase):  # some have no parameters
        kept = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if kept is None else len(kept)
    weight = module._parameters.get("weight")
    if weight is None or tuple(weight.shape) == before.get("weight"):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        _follow_convolution(module, weight, before["weight"])
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
