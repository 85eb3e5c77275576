# SPDX-License-Identifier: Apache-2.0
"""Layers that read the weights of their parts without calling them.

:class:`torch.nn.MultiheadAttention` reads its ``out_proj``; it is given a quantized class without
quantizers, which calls it. :class:`torch.nn.TransformerEncoderLayer` and
:class:`torch.nn.TransformerEncoder` have fused kernels for inference that read the weights of all
their parts; they are told that their conditions are not met, and call their parts then, as in
training. (So padded places of a sequence hold what they hold in training, not zeros.)
"""

from __future__ import annotations

from torch import nn

from modewright.quantization.layers.base import QuantizedLayer, own_class
from modewright.quantization.layers.registry import insert_quantizers
from modewright.quantization.representation import SchemeConfig
from modewright.runtime.layers import PackedLayer


class CallsParts(nn.Module):
    """Comes before the class of a layer whose fused kernel must not run.

    Both attributes are conditions that the plain classes check; what was set stays in the instance.
    """

    @property
    def activation_relu_or_gelu(self) -> int:
        """No activation that the fused kernel of an encoder layer has."""
        return 0

    @property
    def use_nested_tensor(self) -> bool:
        """No nested tensors, which only fused kernels can read."""
        return False


def call_parts(model: nn.Module) -> None:
    """Let layers that read the weights of their parts call these, if one of them is quantized."""
    for module in list(model.modules()):
        plain = isinstance(module, nn.MultiheadAttention) and not isinstance(module, QuantizedLayer)
        if plain and isinstance(module.out_proj, QuantizedLayer):
            insert_quantizers(module, SchemeConfig())
    for module in list(model.modules()):
        if _has_fused_kernel(module) and not isinstance(module, CallsParts) and _quantized(module):
            name, cls = f"Stepwise{type(module).__name__}", type(module)
            module.__class__ = type(name, (CallsParts, cls), {"__module__": __name__})


def read_parts(model: nn.Module) -> None:
    """Give the encoder layers their fused kernels back if none of their parts is quantized."""
    for module in list(model.modules()):
        if isinstance(module, CallsParts) and not _quantized(module):
            module.__class__ = own_class(type(module))  # type: ignore[assignment]


def _has_fused_kernel(module: nn.Module) -> bool:
    return isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder))


def _quantized(module: nn.Module) -> bool:
    return any(isinstance(part, (QuantizedLayer, PackedLayer)) for part in module.modules())
