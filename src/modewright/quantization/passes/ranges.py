# SPDX-License-Identifier: Apache-2.0
"""Modes ``max_calibrate``, ``percentile``, ``entropy``, ``mse`` and ``hqq``: choose all scales.

They differ in which range of what was seen a static activation gets, and in how the scales of
weights are chosen; the codes are the nearest ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modewright.calibration.forward import OnBatch, run_calibration
from modewright.calibration.histogram import HistogramObserver
from modewright.calibration.moments import row_weights
from modewright.calibration.statistics import RangeObserver, Statistic
from modewright.errors import DataError
from modewright.formats.catalogue import NumberFormat
from modewright.quantization.algorithms.entropy import entropy_range, mse_range
from modewright.quantization.algorithms.hqq import hqq_scale
from modewright.quantization.algorithms.percentile import percentile_range
from modewright.quantization.blockwise import walking_precision
from modewright.quantization.config import (
    EntropyConfig,
    HqqConfig,
    MaxCalibrateConfig,
    MseConfig,
    PercentileConfig,
    RangeConfig,
)
from modewright.quantization.convert import quantized_layers, quantizers
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.records import (
    buffers_of,
    set_max_scale,
    settle_shared,
)
from modewright.quantization.passes.scales import mse_scale
from modewright.quantization.quantizer import Quantizer

Metadata = dict[str, Any]
Range = tuple[torch.Tensor, torch.Tensor]
NO_DATA = "a static quantizer that saw no calibration data: its scale stays dynamic"


@dataclass(frozen=True)
class _Choice:
    """How a mode chooses scales.

    Attributes:
        observer: Makes what watches a static activation.
        range_of: The range that its scale covers; ``None`` if nothing was seen.
        weight_scale: Sets the scales of one parameter of a layer: path, layer, parameter.
    """

    observer: Callable[[], Any]
    range_of: Callable[[Any, NumberFormat], Range | None]
    weight_scale: Callable[[str, QuantizedLayer, str], None] = set_max_scale


def max_calibrate(
    model: nn.Module, config: MaxCalibrateConfig, **data: Any
) -> tuple[nn.Module, Metadata]:
    """Take the largest magnitudes, of weights and of what activations were."""
    return _calibrate(model, config, _Choice(RangeObserver, lambda seen, fmt: seen.range), **data)


def percentile(
    model: nn.Module, config: PercentileConfig, **data: Any
) -> tuple[nn.Module, Metadata]:
    """Let the outermost values of activations saturate."""

    def range_of(seen: HistogramObserver, fmt: NumberFormat) -> Range | None:
        return None if seen.range is None else percentile_range(seen, config.percentile)

    return _calibrate(model, config, _Choice(HistogramObserver, range_of), **data)


def entropy(model: nn.Module, config: EntropyConfig, **data: Any) -> tuple[nn.Module, Metadata]:
    """Let activations saturate where that keeps their distribution closest to what it was."""

    def range_of(seen: HistogramObserver, fmt: NumberFormat) -> Range | None:
        return None if seen.range is None else entropy_range(seen, fmt)

    return _calibrate(model, config, _Choice(HistogramObserver, range_of), **data)


def mse(model: nn.Module, config: MseConfig, **data: Any) -> tuple[nn.Module, Metadata]:
    """Take the scales with the least squared error, of weights weighted by their inputs."""

    def range_of(seen: HistogramObserver, fmt: NumberFormat) -> Range | None:
        return None if seen.range is None else mse_range(seen, fmt)

    importance: dict[str, torch.Tensor] = {}
    if config.importance and data.get("calibration") is not None:
        importance = _importance(model, data["calibration"], config.max_row_norm)

    def weight_scale(path: str, layer: QuantizedLayer, parameter: str) -> None:
        search_scale(layer, parameter, importance.get(path) if parameter == "weight" else None)

    choice = _Choice(HistogramObserver, range_of, weight_scale)
    return _calibrate(model, config, choice, **data)


def hqq(model: nn.Module, config: HqqConfig, **data: Any) -> tuple[nn.Module, Metadata]:
    """Choose the scales of weights without data, so that few large errors count little."""

    def weight_scale(path: str, layer: QuantizedLayer, parameter: str) -> None:
        _set_searched(layer, parameter, hqq_scale)

    choice = _Choice(RangeObserver, lambda seen, fmt: seen.range, weight_scale)
    return _calibrate(model, config, choice, **data)


def search_scale(
    layer: QuantizedLayer, parameter: str, importance: torch.Tensor | None = None
) -> None:
    """Set the scales of one parameter to those with the least squared error.

    Args:
        layer: The layer.
        parameter: The parameter's name.
        importance: How much the error of a weight counts by the input that it multiplies, ``[in]``;
            only for a layer that multiplies rows by its weight.
    """
    weights = None
    if importance is not None:
        matrix = layer.weight_matrix(layer.to_quantize(parameter).detach())
        weights = layer.from_matrix(importance.expand_as(matrix))
    _set_searched(layer, parameter, mse_scale, importance=weights)


def _set_searched(
    layer: QuantizedLayer,
    parameter: str,
    search: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    *,
    importance: torch.Tensor | None = None,
) -> None:
    """Set the scales of one parameter to what a search returns."""
    quantizer = layer.quantized_parameters()[parameter]
    value = layer.to_quantize(parameter).detach()
    level = quantizer.level_of(value)
    more = {}
    if importance is not None:
        more["importance"] = quantizer.grouping.split(importance)
    scale, zero_point = search(
        quantizer.grouping.split(value.float()),
        quantizer.format,
        quantizer.config.scale_format,
        level,
        **more,
    )
    quantizer.set_scale(scale, zero_point, level)


def _calibrate(
    model: nn.Module,
    config: RangeConfig,
    choice: _Choice,
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
        for parameter, quantizer in layer.quantized_parameters().items():
            if not quantizer.config.dynamic:
                choice.weight_scale(name, layer, parameter)
    settle_shared(model)
    blind = _observe(model, choice, calibration, on_batch)
    if blind and config.require_data:
        raise DataError(
            f"{len(blind)} static quantizers saw no data: {', '.join(blind[:5])}"
            f"{' ...' if len(blind) > 5 else ''}. Calibrate with data that reaches these layers, "
            "leave them out with `ignore`, or set require_data=False to keep them dynamic."
        )
    skipped = [{"module": name, "reason": NO_DATA} for name in blind]
    return model, {**buffers_of(model), "skipped": skipped}


def _observe(
    model: nn.Module, choice: _Choice, calibration: object, on_batch: OnBatch | None
) -> list[str]:
    """Calibrate all static activation quantizers; return the names of those that saw nothing."""
    waiting = _static_activations(model)
    if not waiting:
        return []
    if calibration is None:
        raise DataError(
            f"{len(waiting)} activation quantizers have static scales ({next(iter(waiting))!r} is "
            "the first) and need data: pass mode_kwargs={'calibration': batches}, or choose a "
            "scheme with dynamic activations such as 'w8a8'."
        )
    observers = {name: choice.observer() for name in waiting}
    try:
        for name, quantizer in waiting.items():
            quantizer.observer = observers[name]
        run_calibration(model, calibration, on_batch=on_batch)
    finally:
        for quantizer in waiting.values():
            quantizer.observer = None
    blind = []
    for name, quantizer in waiting.items():
        seen = choice.range_of(observers[name], quantizer.format)
        if seen is None:
            blind.append(name)
            continue
        try:
            quantizer.set_from_range(*seen)
        except DataError as error:
            raise DataError(f"What {name!r} observed is unusable: {error}") from error
    return blind


def _static_activations(model: nn.Module) -> dict[str, Quantizer]:
    """Return by path the quantizers of activations that take their scales from data."""
    of_parameters = {
        id(quantizer)
        for layer in quantized_layers(model).values()
        for quantizer in layer.quantized_parameters().values()
    }
    return {
        name: quantizer
        for name, quantizer in quantizers(model).items()
        if id(quantizer) not in of_parameters and not quantizer.config.dynamic
    }


def _importance(
    model: nn.Module, calibration: object, max_row_norm: float | None
) -> dict[str, torch.Tensor]:
    """Return by layer the mean square of each of its inputs, ``[in]``."""
    squares: dict[str, Statistic] = {}

    def watch(name: str, layer: QuantizedLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = layer.input_rows(layer.quantized_input(args[0])) if args else None
            if rows is not None and len(rows):
                rows = rows * row_weights(rows, max_row_norm)
                squares.setdefault(name, Statistic("sum")).update(rows.square().sum(0))

        return hook

    def gather() -> None:
        squares.clear()
        run_calibration(model, calibration)

    with ExitStack() as hooks:
        for name, layer in quantized_layers(model).items():
            if layer.weight_quantizer is not None:
                hooks.callback(layer.register_forward_pre_hook(watch(name, layer)).remove)
        if walking_precision(model, calibration, "auto", gather) == "float32":
            gather()
    return {n: s.value / s.value.mean() for n, s in squares.items() if s.value is not None}
