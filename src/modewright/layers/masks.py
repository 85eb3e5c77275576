# SPDX-License-Identifier: Apache-2.0
"""``MaskedLayer``: a layer of which some weights are held at zero.

A masked layer is the same object with a class that is derived from its own: paths, keys of the
state dict and ``isinstance`` stay. Beside a parameter ``NAME`` lies the buffer ``NAME_mask``
(boolean, of the same shape, true where a value is kept), and reading ``NAME`` gives the parameter
times its mask. So what is masked is zero and gets no gradient, whatever an optimizer does to the
parameter, and zero it stays when quantizers are put on the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

import torch
from torch import nn

_SUFFIX = "_mask"


class MaskedLayer(nn.Module):
    """Comes before the class of a layer whose parameters have masks."""


def add_masks(module: nn.Module, names: Iterable[str]) -> None:
    """Turn a layer into a masked one, in place; its masks keep everything until they are set.

    Args:
        module: A plain layer.
        names: Which of its parameters get a mask.
    """
    names = tuple(names)
    for name in names:
        ones = torch.ones_like(cast(torch.Tensor, module._parameters[name]), dtype=torch.bool)
        module.register_buffer(name + _SUFFIX, ones)
    module.__class__ = _masked_class(type(module), names)  # type: ignore[arg-type]


def remove_masks(module: nn.Module) -> None:
    """Fold the masks of a layer into its parameters, and give it its own class back."""
    if not isinstance(module, MaskedLayer):
        return
    for name in masked_parameters(module):
        own = cast(nn.Parameter, module._parameters[name])
        with torch.no_grad():
            value = masked(module, name, own).detach().clone()
        module._parameters[name] = nn.Parameter(value, requires_grad=own.requires_grad)
        del module._buffers[name + _SUFFIX]
    module.__class__ = type(module).__bases__[-1]


def masked_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's parameters that have a mask."""
    return tuple(name for name in module._parameters if name + _SUFFIX in module._buffers)


def mask_of(module: nn.Module, name: str = "weight") -> torch.Tensor | None:
    """Return the mask of a parameter, or ``None``; also of a layer with quantizers on it."""
    return module._buffers.get(name + _SUFFIX)


def set_masked(module: nn.Module, name: str, value: torch.Tensor, mask: torch.Tensor) -> None:
    """Give a masked parameter a value and a mask, both of its shape; nothing is written into."""
    own = cast(nn.Parameter, module._parameters[name])
    made = (value * mask).to(own.dtype).contiguous()
    module._parameters[name] = nn.Parameter(made, requires_grad=own.requires_grad)
    module._buffers[name + _SUFFIX] = mask.contiguous()


def masked(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a value of a parameter's shape, zero where its mask says so."""
    mask = mask_of(module, name)
    return value if mask is None else value * mask


def masked_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return all layers with masks by path."""
    return {name: m for name, m in model.named_modules() if masked_parameters(m)}


@contextmanager
def without_masks(module: nn.Module) -> Iterator[None]:
    """Let the layers in a module be read without their masks."""
    taken = [(m._buffers, key) for m in module.modules() for key in _mask_keys(m)]
    held = [buffers[key] for buffers, key in taken]
    try:
        for buffers, key in taken:
            buffers[key] = None
        yield
    finally:
        for (buffers, key), mask in zip(taken, held, strict=True):
            buffers[key] = mask


def _mask_keys(module: nn.Module) -> list[str]:
    return [name + _SUFFIX for name in masked_parameters(module)]


@cache
def _masked_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[MaskedLayer]:
    """Return the class that a layer of class ``cls`` gets, a subclass of ``cls``."""
    namespace: dict[str, object] = {
        "__module__": __name__,
        "__doc__": f"{cls.__name__} with masks.",
        **{name: _masked_property(name) for name in names},
    }
    made = type(f"Masked{cls.__name__}", (MaskedLayer, cls), namespace)
    return cast("type[MaskedLayer]", made)


def _masked_property(name: str) -> property:
    """Return a property that reads a parameter times its mask."""

    def read(self: nn.Module) -> torch.Tensor | None:
        held = self._parameters if name in self._parameters else self.__dict__
        if name not in held:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = cast("torch.Tensor | None", held[name])
        return None if value is None else masked(self, name, value)

    def write(self: nn.Module, value: torch.Tensor) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(read, write, delete)
