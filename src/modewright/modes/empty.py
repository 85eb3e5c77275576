# SPDX-License-Identifier: Apache-2.0
"""Building a model whose parameters take no memory, because they are loaded or packed afterwards.

Parameters are on the meta device, buffers are real: some of them are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move every parameter that a module registers meanwhile to the meta device.

    Initialisation then costs nothing, and parameters that are tied stay tied.
    """
    handle = register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def has_lost_buffers(model: nn.Module) -> bool:
    """Whether buffers that no checkpoint stores have no values: they were made from parameters."""
    stored = set(model.state_dict())
    return any(b.is_meta and name not in stored for name, b in model.named_buffers())


def _emptied(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
    """Return a parameter in the place of one that is registered, ``None`` for the same one."""
    if parameter is None or is_lazy(parameter) or parameter.is_meta:
        return None
    if type(parameter) is not nn.Parameter or not isinstance(parameter, torch.Tensor):
        return None
    made = nn.Parameter(
        torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
    )
    made.__dict__.update(parameter.__dict__)
    return made
