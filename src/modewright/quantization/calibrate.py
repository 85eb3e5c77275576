# SPDX-License-Identifier: Apache-2.0
"""What the mode ``max_calibrate`` does, and how the scales of any calibration are restored."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from modewright.calibration.forward import OnBatch, run_calibration
from modewright.calibration.statistics import RangeObserver
from modewright.errors import DataError
from modewright.quantization.config import MaxCalibrateConfig
from modewright.quantization.convert import layer_named, quantized_layers, quantizers
from modewright.quantization.quantizer import Quantizer

Metadata = dict[str, Any]
NO_DATA = "a static quantizer that saw no calibration data: its scale stays dynamic"


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
            name: quantizer.shapes()
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
        quantizer = cast(Quantizer, layer_named(model, name))
        layer = layers[name.rpartition(".")[0]]
        quantizer.allocate(_buffer_shapes(shape, quantizer), layer.weight.device)
    return model


def _buffer_shapes(recorded: Any, quantizer: Quantizer) -> dict[str, list[int]]:
    """Return the shapes of a quantizer's buffers; early records hold that of the scale alone."""
    if isinstance(recorded, dict):
        return recorded
    names = ("scale",) if quantizer.config.symmetric else ("scale", "zero_point")
    return {name: list(recorded) for name in names}
