# SPDX-License-Identifier: Apache-2.0
"""Finding the repeated blocks of a network: decoder layers, encoder layers, residual blocks.

What a block is follows from the structure alone: two or more siblings of one class in one
container, each of which holds two or more layers with parameters. The outermost such siblings are
taken, so experts inside a decoder layer are not blocks. Plain containers are looked through, so the
stages of a convolutional network are not blocks either, but what they consist of is.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the repeated blocks of a network, in the order of its modules.

    Returns:
        Paths of modules, none of which is inside another; empty if nothing repeats.

    Example:
        >>> from torch import nn
        >>> layers = [nn.TransformerEncoderLayer(8, 2) for _ in range(3)]
        >>> find_blocks(nn.Sequential(nn.Embedding(4, 8), nn.Sequential(*layers)))
        ('1.0', '1.1', '1.2')
    """
    return tuple(_blocks_in(model, ""))


def _blocks_in(module: nn.Module, path: str) -> list[str]:
    children = list(module.named_children())
    kinds = Counter(type(child) for _, child in children if _may_be_block(child))
    found: list[str] = []
    for name, child in children:
        where = f"{path}.{name}" if path else name
        if kinds[type(child)] > 1 and _may_be_block(child):
            found.append(where)
        else:
            found += _blocks_in(child, where)
    return found


def _may_be_block(module: nn.Module) -> bool:
    """Whether a module is more than a layer and more than a container."""
    if type(module) in _CONTAINERS:
        return False
    layers = (m for m in module.modules() if m is not module and m._parameters)
    with_parameters = [m for m in layers if any(p is not None for p in m._parameters.values())]
    return len(with_parameters) > 1
