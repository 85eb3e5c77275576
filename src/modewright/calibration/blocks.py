# SPDX-License-Identifier: Apache-2.0
"""Finding the repeated blocks of a network: decoder layers, encoder layers, residual blocks.

What a block is follows from the structure alone, never from names. A block holds two or more layers
with parameters, and has siblings that run the same code. The outermost such siblings are taken, so
experts inside a decoder layer are not blocks.

* Members of a container (``Sequential``, ``ModuleList``, ``ModuleDict``) are siblings. One that is
  alone in its container is a block too: a network may have only one.
* A plain ``Sequential`` is looked through. One among others is a block if none is in it.
* Attributes of one module are blocks only if none is in them: of an encoder and a decoder of one
  class, the layers are taken.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the repeated blocks of a network, in the order of its modules.

    Returns:
        Paths of modules, none of which is inside another, and no module twice; empty if nothing
        repeats.

    Example:
        >>> from torch import nn
        >>> layers = [nn.TransformerEncoderLayer(8, 2) for _ in range(3)]
        >>> find_blocks(nn.Sequential(nn.Embedding(4, 8), nn.Sequential(*layers)))
        ('1.0', '1.1', '1.2')
    """
    unique: dict[nn.Module, str] = {}
    for path in _blocks_in(model, ""):
        unique.setdefault(model.get_submodule(path), path)
    return tuple(unique.values())


def _blocks_in(module: nn.Module, path: str) -> list[str]:
    children = {f"{path}.{name}" if path else name: m for name, m in module.named_children()}
    inside = {where: _blocks_in(child, where) for where, child in children.items()}
    kinds = Counter(_kind(child) for child in children.values() if _may_be_block(child))
    opened = {_kind(child) for where, child in children.items() if inside[where]}
    found: list[str] = []
    for where, child in children.items():
        repeated = kinds[_kind(child)] > 1
        if not _may_be_block(child):
            block = False
        elif not isinstance(module, _CONTAINERS):
            block = repeated and type(child) is not nn.Sequential and _kind(child) not in opened
        elif type(child) is nn.Sequential:
            block = repeated and not inside[where]
        else:
            alone = len(children) == 1
            block = repeated or (alone and (type(module) is nn.ModuleList or not inside[where]))
        found += [where] if block else inside[where]
    return found


def _kind(module: nn.Module) -> Any:
    """Return what siblings share: the code they run, even if the class of one was replaced."""
    forward = type(module).forward
    return type(module) if forward is nn.Sequential.forward else forward


def _may_be_block(module: nn.Module) -> bool:
    """Whether a module can be called and is more than one layer."""
    if type(module).forward is nn.Module.forward:
        return False
    parts = (part for part in module.modules() if part is not module)
    return sum(any(p is not None for p in part._parameters.values()) for part in parts) > 1
