# SPDX-License-Identifier: Apache-2.0
"""Which of a layer's arguments and results is the tensor that is quantized: the first of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def on_first_argument(
    function: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply a function to the first argument that holds floating-point numbers."""
    for place, value in enumerate(args):
        if _holds_floats(value):
            return (*args[:place], on_first(function, value), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if _holds_floats(value):
            return args, {**kwargs, name: on_first(function, value)}
    return args, kwargs


def on_first(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to a tensor, or to the first one of a tuple or list."""
    if isinstance(value, PackedSequence):
        return value._replace(data=on_first(function, value.data))
    if isinstance(value, torch.Tensor):
        return function(value) if value.is_floating_point() else value
    if type(value) in (tuple, list) and value:
        return type(value)([on_first(function, value[0]), *value[1:]])
    return value


def _holds_floats(value: object) -> bool:
    tensor = value.data if isinstance(value, PackedSequence) else value
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
