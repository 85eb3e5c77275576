# SPDX-License-Identifier: Apache-2.0
"""``Trial``: what a layer would become under a candidate; the layer itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from modewright.calibration.calls import first_tensor
from modewright.quantization.blockwise import as_original
from modewright.quantization.layers import insert_quantizers
from modewright.quantization.layers.linear import LinearLike
from modewright.quantization.passes.ranges import search_scale
from modewright.quantization.representation import SchemeConfig


class Trial:
    """What a layer would become under a scheme; its parameters are shared with the layer.

    Args:
        layer: The layer; it is not changed.
        scheme: The scheme, fitted to it.
        importance: The mean square of each of its inputs, ``[in]``, by which the scales of the
            weight are searched; ``None`` to weigh all alike.
    """

    def __init__(
        self, layer: nn.Module, scheme: SchemeConfig, importance: torch.Tensor | None = None
    ) -> None:
        self.layer = insert_quantizers(twin(layer), scheme)
        for name, quantizer in self.layer.quantized_parameters().items():
            if not quantizer.config.dynamic:
                search_scale(self.layer, name, importance if name == "weight" else None)

    def change(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return by how much the layer's output changes on an input, float32.

        Raises:
            DataError: The layer puts out no tensor.
        """
        layer = self.layer
        with torch.no_grad():
            if isinstance(layer, LinearLike) and not layer.activation_quantizers():
                change = layer.quantized_weight().float() - layer.own_parameter("weight").float()
                x = cast(torch.Tensor, (*args, *kwargs.values())[0])
                return layer.product(x, change.to(x.dtype), None).float()
            device, dtype = _kind(layer)
            args = tuple(_as(value, dtype) for value in args)
            kwargs = {key: _as(value, dtype) for key, value in kwargs.items()}
            with torch.autocast(device.type, enabled=False):
                after = first_tensor(layer(*args, **kwargs))
                with as_original(layer):
                    before = first_tensor(layer(*args, **kwargs))
        return cast(torch.Tensor, after).float() - cast(torch.Tensor, before).float()

    def weight_error(self) -> float:
        """Return the squared error of all quantized parameters, relative to their own size."""
        error = size = 0.0
        for name in self.layer.quantized_parameters():
            weight = self.layer.own_parameter(name).detach().float()
            low = self.layer.quantized_parameter(name).detach().float()
            error += float((low - weight).square().sum())
            size += float(weight.square().sum())
        return error / size if size else 0.0


def twin(layer: nn.Module) -> nn.Module:
    """Return another module with the same class, attributes, parameters and children; no hooks."""
    other = type(layer).__new__(type(layer))
    for key, value in layer.__dict__.items():
        if key.endswith("_hooks") or key.endswith("_hooks_with_kwargs"):
            value = type(value)()
        elif type(value) in (dict, set):
            value = value.copy()
        other.__dict__[key] = value
    return other


@contextmanager
def standing_in(layers: Mapping[nn.Module, Trial]) -> Iterator[None]:
    """Let layers compute what their trials do."""
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer, trial in layers.items():
            layer.__dict__["forward"] = MethodType(_run, trial.layer)
        yield
    finally:
        for layer, own in before.items():
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.__dict__["forward"] = own


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _kind(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(layer.parameters())
    return parameter.device, parameter.dtype


def _as(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
