# SPDX-License-Identifier: Apache-2.0
"""Which layers can be quantized, and which class they get.

A layer is known by its class (:data:`QUANTIZED_CLASSES`, to which :func:`register_layer` adds) or,
where the class lies in an optional package or there are many of a kind, by its structure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import TypeVar, cast

from torch import nn

from modewright.errors import ConfigError
from modewright.layers.experts import is_experts
from modewright.layers.matrices import transposed_linear
from modewright.layers.roles import is_router_class
from modewright.quantization.layers.attention import MultiheadAttentionForward
from modewright.quantization.layers.base import (
    PATCHED,
    TRANSFORM_BUFFERS,
    OwnForward,
    QuantizedLayer,
    own_class,
    parameter_property,
)
from modewright.quantization.layers.convolution import ConvForward, ConvTransposeForward
from modewright.quantization.layers.experts import ExpertsForward
from modewright.quantization.layers.kv_attention import KvAttentionForward, is_kv_attention
from modewright.quantization.layers.linear import (
    BilinearForward,
    EmbeddingBagForward,
    EmbeddingForward,
    LinearForward,
    RouterForward,
    TransposedLinearForward,
)
from modewright.quantization.layers.recurrent import RecurrentCellForward, RecurrentForward
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import SchemeConfig

Q = TypeVar("Q", bound=type[QuantizedLayer])
OLD_FORWARD = "_old_forward"  # where accelerate keeps what its hooks run around

QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: LinearForward,
    nn.Conv1d: ConvForward,
    nn.Conv2d: ConvForward,
    nn.Conv3d: ConvForward,
    nn.ConvTranspose1d: ConvTransposeForward,
    nn.ConvTranspose2d: ConvTransposeForward,
    nn.ConvTranspose3d: ConvTransposeForward,
    nn.Bilinear: BilinearForward,
    nn.LSTM: RecurrentForward,
    nn.GRU: RecurrentForward,
    nn.RNN: RecurrentForward,
    nn.LSTMCell: RecurrentCellForward,
    nn.GRUCell: RecurrentCellForward,
    nn.RNNCell: RecurrentCellForward,
    nn.MultiheadAttention: MultiheadAttentionForward,
    nn.Embedding: EmbeddingForward,
    nn.EmbeddingBag: EmbeddingBagForward,
}


def register_layer(cls: type[nn.Module]) -> Callable[[Q], Q]:
    """Say how layers of a class, and of its subclasses, are quantized. A class decorator.

    The decorated class derives from :class:`QuantizedLayer`. Without a ``forward`` of its own it
    runs that of the layer, with quantized parameters (``parameter_names``), input and output.

    Args:
        cls: The class of the layers. A class that is known already is known anew.

    Raises:
        ConfigError: What is decorated is no ``QuantizedLayer``, or ``cls`` no module class.
    """

    def register(quantized: Q) -> Q:
        if not issubclass(quantized, QuantizedLayer) or not issubclass(cls, nn.Module):
            raise ConfigError(
                f"register_layer(module class) decorates a subclass of QuantizedLayer; received "
                f"{cls.__name__} and {quantized.__name__}."
            )
        QUANTIZED_CLASSES[cls] = quantized
        return quantized

    return register


def layer_kind(module: nn.Module) -> type[QuantizedLayer] | None:
    """Return how a layer is quantized, ``None`` if it cannot be."""
    if isinstance(module, QuantizedLayer):
        return cast("type[QuantizedLayer]", type(module).__bases__[-2])
    base = _known_class(type(module))
    if base is not None:
        return QUANTIZED_CLASSES[base]
    if transposed_linear(type(module)) is not None:
        return TransposedLinearForward
    if is_kv_attention(module):
        return KvAttentionForward
    if is_experts(module):
        return ExpertsForward
    return RouterForward if is_router_class(module) else None


def supported_names() -> str:
    """Return what can be quantized, for messages."""
    known = ", ".join(cls.__name__ for cls in QUANTIZED_CLASSES)
    return f"{known}, fused experts, and attention of Transformers models (keys and values)"


def fitted_scheme(module: nn.Module, scheme: SchemeConfig) -> SchemeConfig:
    """Return what of a scheme a layer can have: indices stay, convolutions know no tokens."""
    kind = layer_kind(module)
    return SchemeConfig() if kind is None else kind.fitted(module, scheme)


def insert_quantizers(module: nn.Module, scheme: SchemeConfig) -> QuantizedLayer:
    """Change a supported layer's class in place and give it the quantizers of ``scheme``.

    Raises:
        ConfigError: Such a layer cannot be quantized.
    """
    kind = layer_kind(module)
    if kind is None:
        raise ConfigError(
            f"A {type(module).__name__} cannot be quantized; supported: {supported_names()}."
        )
    scheme = kind.fitted(module, scheme)
    own = _has_own_forward(module, kind)
    names = kind.parameter_names(module)
    module.__class__ = _quantized_class(type(module), kind, names, own)  # type: ignore[arg-type]
    layer = cast(QuantizedLayer, module)
    _take_over_forward(layer)
    for name in TRANSFORM_BUFFERS:
        layer.register_buffer(name, None)
    layer.add_quantizers(scheme)
    for child in layer.children():
        if isinstance(child, Quantizer):
            child.training = layer.training
    return layer


def remove_quantizers(layer: QuantizedLayer) -> nn.Module:
    """Give a layer its own class back and drop its quantizers; its parameters stay as they are."""
    _give_back_forward(layer)
    for name, child in list(layer._modules.items()):
        if isinstance(child, Quantizer):
            del layer._modules[name]
    for name in TRANSFORM_BUFFERS:
        del layer._buffers[name]
    for name in list(layer.__dict__):
        if name.endswith("_quantizer") or name == "hadamard_size":
            del layer.__dict__[name]
    layer.__class__ = own_class(type(layer))  # type: ignore[assignment]
    return layer


@cache
def _quantized_class(
    cls: type[nn.Module], kind: type[QuantizedLayer], names: tuple[str, ...], own_forward: bool
) -> type[QuantizedLayer]:
    """Return the class that a layer of class ``cls`` gets, a subclass of ``cls``."""
    bases = (OwnForward, kind, cls) if own_forward else (kind, cls)
    namespace: dict[str, object] = {
        "__module__": __name__,
        "__doc__": f"Quantized {cls.__name__}.",
        **{name: parameter_property(name) for name in names},
    }
    return cast("type[QuantizedLayer]", type(f"Quantized{cls.__name__}", bases, namespace))


def _has_own_forward(module: nn.Module, kind: type[QuantizedLayer]) -> bool:
    """Whether the arithmetic of a kind would pass over a forward of the subclass or instance."""
    if kind.forward is QuantizedLayer.forward:
        return False  # it runs whatever forward there is
    base = _known_class(type(module)) or transposed_linear(type(module))
    if base is None or type(module).forward is not base.forward:
        return True
    patched = _patched(module)
    own = None if patched is None else module.__dict__[patched]
    return own is not None and getattr(own, "__func__", None) is not base.forward


def _patched(module: nn.Module) -> str | None:
    """Return under what name an instance has a forward: hooks of accelerate keep it aside."""
    if OLD_FORWARD in module.__dict__ and "_hf_hook" in module.__dict__:
        return OLD_FORWARD
    return "forward" if "forward" in module.__dict__ else None


def _take_over_forward(layer: QuantizedLayer) -> None:
    """Run the quantized forward where the instance's own one was run."""
    key = _patched(layer)
    if key is None:
        return
    layer.__dict__[PATCHED] = (key, layer.__dict__.pop(key))
    if key == OLD_FORWARD:
        layer.__dict__[key] = MethodType(type(layer).forward, layer)


def _give_back_forward(layer: QuantizedLayer) -> None:
    """Put the instance's own forward where the quantized one is, also in hooks that came later."""
    key, own = layer.__dict__.pop(
        PATCHED, (None, MethodType(own_class(type(layer)).forward, layer))
    )
    for place in (OLD_FORWARD, "forward"):
        held = layer.__dict__.get(place)
        if getattr(held, "__func__", None) is type(layer).forward:
            layer.__dict__[place] = own
    if key == "forward":
        layer.__dict__.setdefault(key, own)


def _known_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return the nearest of a class and its bases in :data:`QUANTIZED_CLASSES`."""
    return next((base for base in cls.__mro__ if base in QUANTIZED_CLASSES), None)
