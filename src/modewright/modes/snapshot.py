# SPDX-License-Identifier: Apache-2.0
"""``Snapshot``: undo for a model.

A mode that replaces tensors, classes, children and hooks is undone by putting references back,
which costs no copy of any weight. What is remembered, for every module: its class, its attributes,
and the contents of those attributes that are dicts, lists or sets (parameters, buffers, children,
hooks are such dicts); for every tensor, gradients among them: the storage it points to,
``requires_grad`` and ``grad``.
For a mode that may write *into* tensors (``writes_in_place``), their values are copied too.

Objects that hang on attributes (a Hugging Face ``config``, say) are remembered as references: edits
inside them are not undone.
"""

from __future__ import annotations

import gc
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from types import TracebackType
from typing import Any

import torch
from torch import nn

# The containers whose contents are remembered. Exact types: a subclass may do anything.
_CONTAINERS: frozenset[type] = frozenset({dict, OrderedDict, defaultdict, list, set, deque})
_PLAIN_TENSORS: frozenset[type] = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})


class Snapshot:
    """A context that puts the model back as it was if its body raises anything.

    Ten thousand modules are remembered in some ten milliseconds, which is why attributes are copied
    in bulk and facts are kept in parallel lists rather than in an object for each module.

    Args:
        modules: All modules of the model, the root first; nothing else is remembered.
        values: Also copy the values of all parameters and buffers.
        enabled: ``False`` makes this a context that does nothing.
    """

    def __init__(
        self, modules: Sequence[nn.Module], *, values: bool = False, enabled: bool = True
    ) -> None:
        self.modules = modules
        self.enabled = enabled
        if enabled:
            with _collection_paused():
                self._remember(values)

    def _remember(self, values: bool) -> None:
        self._classes = [module.__class__ for module in self.modules]
        self._dicts = [module.__dict__.copy() for module in self.modules]
        self._filled: list[Any] = [
            value
            for attributes in self._dicts
            for value in attributes.values()
            if value.__class__ in _CONTAINERS and value
        ]
        self._contents = [container.copy() for container in self._filled]
        self._tensors = _plain_tensors(self._dicts)
        self._leaves = list(map(attrgetter("is_leaf"), self._tensors))
        self._grads = _grads(self._tensors, self._leaves)
        gradients = [grad for grad in self._grads if grad.__class__ is torch.Tensor]
        self._tensors += gradients
        self._leaves += map(attrgetter("is_leaf"), gradients)
        self._grads += map(_grad, gradients)
        self._data = [tensor.data for tensor in self._tensors]
        self._requires_grad = list(map(attrgetter("requires_grad"), self._tensors))
        self._versions = _versions(self._tensors)
        self._values = torch._foreach_clone(self._data) if values and self._data else None

    def __enter__(self) -> Snapshot:
        """Return the snapshot."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Roll back if the body raised."""
        if kind is not None and self.enabled:
            self.roll_back()

    def roll_back(self) -> None:
        """Put back everything that was remembered."""
        contents = {id(c): copy for c, copy in zip(self._filled, self._contents, strict=True)}
        for module, cls, attributes in zip(self.modules, self._classes, self._dicts, strict=True):
            if module.__class__ is not cls:
                object.__setattr__(module, "__class__", cls)
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for value in attributes.values():
                if value.__class__ in _CONTAINERS:
                    _refill(value, contents.get(id(value), ()))
        with torch.no_grad():
            self._roll_back_tensors()
        if self._values is not None:
            with torch.inference_mode():  # lets tensors be written that were made in it
                for data, value in zip(self._data, self._values, strict=True):
                    _distinct(data).copy_(_distinct(value, like=data))

    def _roll_back_tensors(self) -> None:
        for index, tensor in enumerate(self._tensors):
            tensor.data = self._data[index]
            if self._leaves[index] and not tensor.is_leaf:
                tensor.detach_()  # an operation with gradients was written into it
            if tensor.requires_grad is not self._requires_grad[index]:
                tensor.requires_grad_(self._requires_grad[index])
        for tensor, grad in zip(self._tensors, self._grads, strict=True):
            if _grad(tensor) is not grad:  # only now has every gradient its dtype and shape again
                tensor.grad = grad

    def written_in_place(self) -> list[str]:
        """Return the names of tensors whose values were changed and cannot be put back.

        Always empty if values were copied. Call it before or after :meth:`roll_back`; writes
        through ``tensor.data`` leave no trace and are not found.
        """
        if not self.enabled or self._values is not None:
            return []
        dirty = {
            id(tensor)
            for tensor, version in zip(self._tensors, self._versions, strict=True)
            if _version(tensor) != version
        }
        if not dirty:
            return []
        root = self.modules[0]
        named = list(chain(root.named_parameters(), root.named_buffers()))
        grads = [(f"{name}.grad", _grad(tensor)) for name, tensor in named]
        return [name for name, tensor in [*named, *grads] if id(tensor) in dirty]


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from scanning the process while many dicts are copied."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _plain_tensors(dicts: Iterable[dict[str, Any]]) -> list[torch.Tensor]:
    """Return every parameter and buffer once; tensor subclasses are left to their references."""
    found: dict[int, torch.Tensor] = {
        id(tensor): tensor  # type: ignore[misc]
        for attributes in dicts
        for member in ("_parameters", "_buffers")
        for tensor in attributes.get(member, {}).values()
        if tensor.__class__ in _PLAIN_TENSORS
    }
    return list(found.values())


def _grad(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _grads(tensors: list[torch.Tensor], leaves: list[bool]) -> list[torch.Tensor | None]:
    if all(leaves):  # nearly always, and several times as fast
        return list(map(attrgetter("grad"), tensors))
    return list(map(_grad, tensors))


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # tensors made in inference mode keep none
        return list(map(_version, tensors))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _distinct(tensor: torch.Tensor, *, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return the elements that lie apart in memory; an expanded tensor repeats the others."""
    if tensor.layout is not torch.strided:
        return tensor
    strides = (tensor if like is None else like).stride()
    return tensor[tuple(slice(None if stride else 1) for stride in strides)]


def _refill(container: Any, content: Any) -> None:
    """Make a container hold what its copy holds; it stays the same object."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)
