# SPDX-License-Identifier: Apache-2.0
"""Which layers can be quantized, and how their class is changed in place.

A quantized layer is the same object with a class that is derived from its own: paths, keys of the
state dict and ``isinstance`` stay. Its ``forward`` passes input, weight and output through the
quantizers that are there; they are children named ``input_quantizer``, ``weight_quantizer`` and
``output_quantizer``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.errors import ConfigError
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import QuantizerConfig, SchemeConfig

QUANTIZER_NAMES = ("weight_quantizer", "input_quantizer", "output_quantizer")


class QuantizedLayer(nn.Module):
    """Base of the quantized classes: what to do with input, weight and output.

    Attributes:
        channel_axis: The axis of output channels in the weight. A transposed convolution with
            groups has those of one group there: channels at the same place share a scale.
        token_inputs: Whether the last axis of input and output is one token's features. A
            convolution sums over positions, so per-token scales cannot be taken out of its sum.
    """

    channel_axis = 0
    token_inputs = True

    weight: torch.Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None

    def quantized_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the input as the layer's kernel would see it."""
        return tensor if self.input_quantizer is None else self.input_quantizer(tensor)

    def quantized_weight(self) -> torch.Tensor:
        """Return the weight as the layer's kernel would see it."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def quantized_output(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the output as the next layer would see it."""
        return tensor if self.output_quantizer is None else self.output_quantizer(tensor)


class LinearForward(QuantizedLayer):
    """Quantized :class:`torch.nn.Linear`."""

    bias: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        result = F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
        return self.quantized_output(result)


class ConvForward(QuantizedLayer):
    """Quantized :class:`torch.nn.Conv1d`, ``Conv2d`` and ``Conv3d``."""

    token_inputs = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        own = cast(nn.Conv2d, self)
        result = own._conv_forward(self.quantized_input(input), self.quantized_weight(), own.bias)
        return self.quantized_output(result)


class ConvTransposeForward(QuantizedLayer):
    """Quantized :class:`torch.nn.ConvTranspose1d`, ``ConvTranspose2d`` and ``ConvTranspose3d``."""

    channel_axis = 1
    token_inputs = False

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:  # noqa: D102
        own = cast(nn.ConvTranspose2d, self)
        dimensions = own.weight.ndim - 2
        function: Any = getattr(F, f"conv_transpose{dimensions}d")
        padding = own._output_padding(
            input,
            output_size,
            own.stride,  # type: ignore[arg-type]
            own.padding,  # type: ignore[arg-type]
            own.kernel_size,  # type: ignore[arg-type]
            dimensions,
            own.dilation,  # type: ignore[arg-type]
        )
        result = function(
            self.quantized_input(input),
            self.quantized_weight(),
            own.bias,
            own.stride,
            own.padding,
            padding,
            own.groups,
            own.dilation,
        )
        return self.quantized_output(result)


class EmbeddingForward(QuantizedLayer):
    """Quantized :class:`torch.nn.Embedding`; its input is indices, which have no precision."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        own = cast(nn.Embedding, self)
        result = F.embedding(
            input,
            self.quantized_weight(),
            own.padding_idx,
            own.max_norm,
            own.norm_type,
            own.scale_grad_by_freq,
            own.sparse and self.weight_quantizer is None,  # it passes no sparse gradient on
        )
        return self.quantized_output(result)


QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: LinearForward,
    nn.Conv1d: ConvForward,
    nn.Conv2d: ConvForward,
    nn.Conv3d: ConvForward,
    nn.ConvTranspose1d: ConvTransposeForward,
    nn.ConvTranspose2d: ConvTransposeForward,
    nn.ConvTranspose3d: ConvTransposeForward,
    nn.Embedding: EmbeddingForward,
}
DEFAULT_TARGETS: tuple[str, ...] = tuple(
    cls.__name__ for cls in QUANTIZED_CLASSES if cls is not nn.Embedding
)
# Modules that read the weights of their children without calling them, so that a quantizer inside
# would never run.
READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def supported_base(module: nn.Module) -> type[nn.Module] | None:
    """Return the class in :data:`QUANTIZED_CLASSES` that ``module`` is an instance of, if any."""
    return next((cls for cls in QUANTIZED_CLASSES if isinstance(module, cls)), None)


def channel_axis(module: nn.Module) -> int:
    """Return the axis of output channels in the weight of a supported layer."""
    base = supported_base(module)
    return 0 if base is None else QUANTIZED_CLASSES[base].channel_axis


def overrides_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass, or the instance, has a ``forward`` of its own."""
    return type(module).forward is not base.forward or "forward" in module.__dict__


@cache
def quantized_class(cls: type[nn.Module], base: type[nn.Module]) -> type[QuantizedLayer]:
    """Return the class that a layer of class ``cls`` gets, a subclass of ``cls``."""
    mixin = QUANTIZED_CLASSES[base]
    name = f"Quantized{cls.__name__}"
    made = type(
        name, (mixin, cls), {"__module__": __name__, "__doc__": f"Quantized {cls.__name__}."}
    )
    return cast("type[QuantizedLayer]", made)


def fitted_scheme(module: nn.Module, scheme: SchemeConfig) -> SchemeConfig:
    """Return what of a scheme a layer can have: indices stay, convolutions know no tokens."""
    changes: dict[str, QuantizerConfig | None] = {}
    if isinstance(module, nn.Embedding):
        changes["input_activations"] = None
    elif (base := supported_base(module)) and not QUANTIZED_CLASSES[base].token_inputs:
        for name in ("input_activations", "output_activations"):
            quantizer = getattr(scheme, name)
            if quantizer is not None and quantizer.granularity in ("token", "group"):
                whole = {"granularity": "tensor", "group_size": None}
                changes[name] = quantizer.model_copy(update=whole)
    return scheme.model_copy(update=changes)


def insert_quantizers(module: nn.Module, scheme: SchemeConfig) -> QuantizedLayer:
    """Change a supported layer's class in place and give it the quantizers of ``scheme``."""
    base = supported_base(module)
    if base is None:
        raise ConfigError(
            f"A {type(module).__name__} cannot be quantized; supported: "
            f"{', '.join(cls.__name__ for cls in QUANTIZED_CLASSES)}."
        )
    cls = quantized_class(type(module), base)  # type: ignore[arg-type]
    module.__class__ = cls
    layer = cast(QuantizedLayer, module)
    scheme = fitted_scheme(module, scheme)
    layer.weight_quantizer = _quantizer(scheme.weights, cls.channel_axis)
    layer.input_quantizer = _quantizer(scheme.input_activations, None)
    layer.output_quantizer = _quantizer(scheme.output_activations, None)
    for child in layer.children():
        child.training = layer.training
    return layer


def remove_quantizers(layer: QuantizedLayer) -> nn.Module:
    """Give a layer its own class back and drop its quantizers; its weight stays as it is."""
    for name in QUANTIZER_NAMES:
        delattr(layer, name)
    layer.__class__ = type(layer).__bases__[1]  # made of (forward, own class)
    return layer


def _quantizer(config: QuantizerConfig | None, channel_axis: int | None) -> Quantizer | None:
    return None if config is None else Quantizer(config, channel_axis)
