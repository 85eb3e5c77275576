# SPDX-License-Identifier: Apache-2.0
"""What fused layers share: their base, and when the kernels serve."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from modewright.runtime.backends.choice import allows
from modewright.runtime.native.between import Between, between
from modewright.runtime.native.library import DTYPES


class FusedLayer(nn.Module):
    """Base of fused layers; the class that a layer had is its last base."""

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the class that the layer had."""
        return own_class(type(self)).forward(self, *args, **kwargs)


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a fused layer had."""
    return cast("type[nn.Module]", cls.__bases__[-1])


def kernels_for(*tensors: torch.Tensor) -> Between | None:
    """Return the kernels if they serve such tensors: float32 or bfloat16, all of them."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype is not dtype or not x.is_cpu:
            return None
    if (
        dtype not in DTYPES
        or type(tensors[0]) is not torch.Tensor
        or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or not allows("native")
    ):
        return None
    return between()
