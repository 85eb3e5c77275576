# SPDX-License-Identifier: Apache-2.0
"""Units: the pieces into which a model is cut, each of which is filled and converted by itself.

Every repeated block is a unit, and all the rest (embedding, final norm, head) is one more. A unit
becomes a *shell*: modules that have the very paths that they have in the model, and nothing else,
so that patterns match in the shell what they match in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modewright.calibration.blocks import find_blocks
from modewright.errors import DataError
from modewright.integrations.shards import Shards

REST = "the rest"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Stored:
    """A tensor of a model that its files hold.

    Attributes:
        names: All names in the state dict; more than one for tied weights.
        shape: Its shape.
        dtype: The dtype that it has in the model.
    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its bytes in the model."""
        return self.shape.numel() * self.dtype.itemsize


class Units:
    """A model without weights, and the units that it is cut into.

    Args:
        skeleton: The model; its parameters and stored buffers hold no values.

    Attributes:
        skeleton: The same.
        blocks: Paths of the repeated blocks, in order.
        stored: Every tensor that is to be read, tied ones once.

    Raises:
        DataError: Nothing in it repeats, or a weight is shared between blocks.
    """

    def __init__(self, skeleton: nn.Module) -> None:
        self.skeleton = skeleton
        self.blocks = find_blocks(skeleton)
        if not self.blocks:
            raise DataError(
                f"{type(skeleton).__name__} has no repeated blocks, so it cannot be optimized "
                "block by block. Leave streaming out."
            )
        self.stored = _stored(skeleton)
        for tensor in self.stored:
            owners = sorted({self.owner(name) for name in tensor.names})
            if len(owners) > 1:
                raise DataError(
                    f"{tensor.names[0]!r} is shared between {', '.join(owners)}, which streaming "
                    "would hold one after the other. Leave streaming out."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all units, in the order in which they are converted."""
        return (*self.blocks, REST)

    def shell(self, unit: str) -> nn.Module:
        """Return a unit as modules under their own paths, without values."""
        if unit == REST:
            holes: dict[int, Any] = {
                id(self.skeleton.get_submodule(block)): nn.Identity() for block in self.blocks
            }
            return copy.deepcopy(self.skeleton, holes)
        root = nn.Module()
        place, source = root, self.skeleton
        *parents, last = unit.split(".")
        for name in parents:
            source = source.get_submodule(name)
            container = type(source)() if type(source) in _CONTAINERS else nn.Module()
            place._modules[name] = container
            place = container
        place._modules[last] = copy.deepcopy(source.get_submodule(last))
        return root.train(self.skeleton.training)

    def fill(self, shell: nn.Module, shards: Shards) -> None:
        """Read a shell's tensors; tied ones are one tensor again.

        Raises:
            CheckpointError: A file is damaged.
        """
        names = {name: tensor for tensor in self.stored for name in tensor.names}
        holders = _holders(shell)
        wanted = [
            (found[0], names[found[0]].names, names[found[0]].dtype) for found in holders.values()
        ]
        places = {found[0]: found for found in holders.values()}
        for name, tensor in shards.read(wanted):
            own = _get(shell, name)
            made = tensor
            if isinstance(own, nn.Parameter):
                made = nn.Parameter(tensor, requires_grad=own.requires_grad)
            for place in places[name]:
                _set(shell, place, made)

    def owner(self, name: str) -> str:
        """Return the unit that a tensor or module of this path belongs to."""
        return next((b for b in self.blocks if name.startswith(f"{b}.")), REST)


def _stored(model: nn.Module) -> tuple[Stored, ...]:
    """Return every tensor of a model's state dict, tied ones once."""
    tensors = model.state_dict(keep_vars=True)
    found = []
    for names in _holders(model).values():
        tensor = tensors[names[0]]
        found.append(Stored(tuple(names), tensor.shape, tensor.dtype))
    return tuple(found)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every tensor of a state dict, by the tensor's identity."""
    holders: dict[int, list[str]] = {}
    for name, tensor in _tensors(model):
        holders.setdefault(id(tensor), []).append(name)
    return holders


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise DataError(
                f"{name!r} in the state dict of {type(model).__name__} is a "
                f"{type(tensor).__name__}, which cannot be streamed."
            )
        yield name, tensor


def _get(model: nn.Module, name: str) -> torch.Tensor:
    path, _, member = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), member)
    return found


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, member = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[member] = tensor
    else:
        owner._buffers[member] = tensor
