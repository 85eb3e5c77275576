# SPDX-License-Identifier: Apache-2.0
"""Comparing a model with what it was: identities and values of everything that hangs on it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn


class Photograph:
    """What a model was when it was taken.

    Objects are compared by identity, tensors by identity, memory, flags and bytes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._alive: list[object] = []  # so that no id is given to another object
        self._facts = self._take(model)

    def differences(self, model: nn.Module) -> list[str]:
        now = self._take(model)
        keys = dict.fromkeys([*self._facts, *now])
        return [key for key in keys if self._facts.get(key) != now.get(key)]

    def _take(self, model: nn.Module) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            facts[f"{path} is"] = self._id(module)
            facts[f"{path} class"] = type(module)
            facts[f"{path} attributes"] = list(vars(module))
            for name, value in vars(module).items():
                facts[f"{path}.{name}"] = self._fact(value)
        return facts

    def _fact(self, value: object) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return type(value), value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return self._id(value), [(key, self._fact(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return self._id(value), [self._fact(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return self._id(value), {self._id(item) for item in value}
        return self._id(value)

    def _tensor(self, tensor: torch.Tensor) -> Any:
        grad = tensor.grad if tensor.is_leaf else None
        return (
            self._id(tensor),
            type(tensor),
            0 if tensor.is_meta else tensor.untyped_storage().data_ptr(),
            tensor.stride(),
            tensor.requires_grad,
            tensor.is_leaf,
            content(tensor),
            None if grad is None else (self._id(grad), content(grad)),
        )

    def _id(self, value: object) -> int:
        self._alive.append(value)
        return id(value)


def content(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Dtype, shape and bytes of a tensor."""
    if tensor.is_meta:
        return tensor.dtype, tuple(tensor.shape), b""
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return tensor.dtype, tuple(tensor.shape), data


def contents(model: nn.Module) -> dict[str, Any]:
    """Dtype, shape and bytes of everything in a state dict."""
    return {name: content(tensor) for name, tensor in model.state_dict().items()}
