# SPDX-License-Identifier: Apache-2.0
"""What the quantization modes do: put quantizers in, set their scales, fold them away."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from modewright.calibration.forward import OnBatch, run_calibration
from modewright.calibration.statistics import RangeObserver
from modewright.errors import CheckpointError, DataError
from modewright.quantization.config import MaxCalibrateConfig, QuantizeConfig, SchemeConfig
from modewright.quantization.layers import (
    QuantizedLayer,
    insert_quantizers,
    remove_quantizers,
)
from modewright.quantization.planning import plan_layers
from modewright.quantization.quantizer import Quantizer

Metadata = dict[str, Any]
NO_DATA = "a static quantizer that saw no calibration data: its scale stays dynamic"


def quantize(model: nn.Module, config: QuantizeConfig) -> tuple[nn.Module, Metadata]:
    """Put quantizers on the layers that the rules pick."""
    plan = plan_layers(model, config)
    for name, scheme in plan.schemes.items():
        insert_quantizers(model.get_submodule(name), scheme)
    metadata = {
        "layers": {name: scheme.model_dump(mode="json") for name, scheme in plan.schemes.items()},
        "skipped": [{"module": n, "reason": r.value} for n, r in plan.skipped.items()],
        "unmatched": list(plan.unmatched),
    }
    return model, metadata


def restore_quantize(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Put the recorded quantizers back, without scales."""
    for name, scheme in metadata["layers"].items():
        insert_quantizers(_layer(model, name), SchemeConfig.model_validate(scheme))
    return model


def _layer(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule that the record names.

    Raises:
        CheckpointError: The model has none of that name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"The record names the layer {name!r}, but this {type(model).__name__} has none of "
            "that name: it is of another architecture."
        ) from error


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return all quantized layers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return all quantizers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def max_calibrate(
    model: nn.Module,
    config: MaxCalibrateConfig,
    *,
    calibration: object = None,
    on_batch: OnBatch | None = None,
) -> tuple[nn.Module, Metadata]:
    """Set the scales of weights from the weights, and those of activations from data.

    Raises:
        DataError: Static activation quantizers need data and there is none, or it never reached
            one of them, or a tensor has values that are not finite.
    """
    for name, layer in quantized_layers(model).items():
        if layer.weight_quantizer is not None and not layer.weight_quantizer.config.dynamic:
            try:
                layer.weight_quantizer.set_from_tensor(layer.weight)
            except DataError as error:
                raise DataError(f"The weight of {name!r} cannot be quantized: {error}") from error
    blind = _observe(model, calibration, on_batch)
    if blind and config.require_data:
        raise DataError(
            f"{len(blind)} static quantizers saw no data: {', '.join(blind[:5])}"
            f"{' ...' if len(blind) > 5 else ''}. Calibrate with data that reaches these layers, "
            "leave them out with `ignore`, or set require_data=False to keep them dynamic."
        )
    metadata = {
        "scales": {
            name: list(quantizer.scale.shape)
            for name, quantizer in quantizers(model).items()
            if quantizer.scale is not None
        },
        "skipped": [{"module": name, "reason": NO_DATA} for name in blind],
    }
    return model, metadata


def _observe(model: nn.Module, calibration: object, on_batch: OnBatch | None) -> list[str]:
    """Calibrate all static activation quantizers; return the names of those that saw nothing."""
    weights = {id(m.weight_quantizer) for m in quantized_layers(model).values()}
    waiting = {
        n: q for n, q in quantizers(model).items() if id(q) not in weights and not q.config.dynamic
    }
    if not waiting:
        return []
    if calibration is None:
        raise DataError(
            f"{len(waiting)} activation quantizers have static scales ({next(iter(waiting))!r} is "
            "the first) and need data: pass mode_kwargs={'calibration': batches}, or choose a "
            "scheme with dynamic activations such as 'w8a8'."
        )
    observers = {name: RangeObserver() for name in waiting}
    try:
        for name, quantizer in waiting.items():
            quantizer.observer = observers[name]
        run_calibration(model, calibration, on_batch=on_batch)
    finally:
        for quantizer in waiting.values():
            quantizer.observer = None
    for name, quantizer in waiting.items():
        seen = observers[name].range
        if seen is not None:
            try:
                quantizer.set_from_range(*seen)
            except DataError as error:
                raise DataError(f"What {name!r} observed is unusable: {error}") from error
    return [name for name, observer in observers.items() if observer.range is None]


def restore_scales(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Make room for the scales that the checkpoint holds."""
    layers = quantized_layers(model)
    for name, shape in metadata["scales"].items():
        quantizer = cast(Quantizer, _layer(model, name))
        layer = layers[name.rpartition(".")[0]]
        quantizer.allocate((int(shape[0]), int(shape[1])), layer.weight.device)
    return model


def export_quantize(model: nn.Module) -> tuple[nn.Module, Metadata]:
    """Fold the quantized weights into plain layers and remove all quantizers.

    The scales of activations are gone afterwards: a plain layer cannot hold them.
    """
    folded: dict[nn.Parameter, nn.Parameter] = {}
    layers = quantized_layers(model)
    activations = [
        name
        for name, layer in layers.items()
        if layer.input_quantizer is not None or layer.output_quantizer is not None
    ]
    for layer in layers.values():
        own = cast(nn.Parameter, layer._parameters["weight"])
        if layer.weight_quantizer is not None:
            if own not in folded:  # a shared weight is folded once and stays shared
                with torch.no_grad():
                    weight = layer.quantized_weight().contiguous()
                folded[own] = nn.Parameter(weight, requires_grad=own.requires_grad)
            layer._parameters["weight"] = folded[own]
        remove_quantizers(layer)
    reason = "its activations are no longer quantized: a plain layer has no place for their scale"
    metadata = {
        "layers": list(layers),
        "skipped": [{"module": name, "reason": reason} for name in activations],
    }
    return model, metadata


def restore_export(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Remove the quantizers; the folded weights come from the checkpoint."""
    for name in metadata["layers"]:
        remove_quantizers(cast(QuantizedLayer, _layer(model, name)))
    return model
