# SPDX-License-Identifier: Apache-2.0
"""What the modes ``compress`` and ``decompress`` do: from quantizers to packed tensors, and back.

Codes and scales are taken over as the quantizers have them: chosen codes as they were chosen,
others the nearest ones, and max scales where there are none. What a layer had for its inputs (a
scale, a rotation, a branch of low rank, a quantizer) goes with it. What a mask holds at zero has
the code of zero: masks are folded. What lies between packed layers is fused
(:mod:`modewright.runtime.layers.fused`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from modewright.errors import CheckpointError, ConfigError, DataError
from modewright.formats.affine import quantize
from modewright.formats.catalogue import encode
from modewright.layers.experts import is_transposed
from modewright.layers.masks import masked_layers, remove_masks
from modewright.quantization.config import CompressConfig
from modewright.quantization.convert import layer_named, quantized_layers
from modewright.quantization.layers import QuantizedLayer, layer_kind, remove_quantizers
from modewright.quantization.layers.attention import MultiheadAttentionForward
from modewright.quantization.layers.base import PATCHED, OwnForward
from modewright.quantization.layers.convolution import ConvForward, ConvTransposeForward
from modewright.quantization.layers.experts import ExpertsForward
from modewright.quantization.layers.linear import (
    EmbeddingBagForward,
    EmbeddingForward,
    LinearForward,
    TransposedLinearForward,
)
from modewright.quantization.layers.recurrent import RecurrentForward
from modewright.quantization.quantizer import BUFFERS, Quantizer
from modewright.runtime.activations import ActivationSpec
from modewright.runtime.huge_pages import HugePages
from modewright.runtime.layers import (
    LayerRecord,
    PackedConv,
    PackedEmbedding,
    PackedExperts,
    PackedLayer,
    PackedLinear,
    PackedParameter,
    PackedRecurrent,
    PackedTransposedLinear,
    make_packed,
)
from modewright.runtime.layers.fused import fuse, fuse_as_recorded
from modewright.runtime.layers.record import INPUT_TENSORS, TRANSFORMS
from modewright.runtime.packed_spec import PackedSpec, ScaleDtype
from modewright.runtime.packed_weight import PackedWeight, fits_float16

Metadata = dict[str, Any]
PACKED_KINDS: dict[type[QuantizedLayer], type[PackedLayer]] = {
    LinearForward: PackedLinear,
    TransposedLinearForward: PackedTransposedLinear,
    ConvForward: PackedConv,
    ConvTransposeForward: PackedLayer,
    EmbeddingForward: PackedEmbedding,
    EmbeddingBagForward: PackedLayer,
    ExpertsForward: PackedExperts,
    RecurrentForward: PackedRecurrent,
}
_ACTIVATIONS = {"input_quantizer": "input", "output_quantizer": "output"}
_SCALE_DTYPES: dict[str, ScaleDtype] = {"e8m0": "uint8", "e4m3": "float8_e4m3fn"}


def compress(model: nn.Module, config: CompressConfig) -> tuple[nn.Module, Metadata]:
    """Pack the weights of all quantized layers that can be packed.

    Raises:
        ConfigError: None can.
        DataError: A weight has values that are not finite.
    """
    skipped: dict[str, str] = {}
    packed: dict[str, LayerRecord] = {}
    once = _PackedOnce(config.scale_dtype)
    for path, layer in quantized_layers(model).items():
        reason = why_not_packed(model, path, layer)
        if reason is None:
            names = list(layer.quantized_parameters())
            packed[path] = _pack_layer(layer, {n: once.weight(path, layer, n) for n in names})
        else:
            skipped[path] = reason
    if not packed:
        reasons = "".join(f"\n  {path or 'the model'}: {why}" for path, why in skipped.items())
        raise ConfigError(f"mode 'compress' would pack nothing:{reasons}")
    _fold_masks(model)
    fused = fuse(model, packed) if config.fuse else {}
    metadata = {
        "layers": {path: record.as_dict() for path, record in packed.items()},
        "shared": once.shared,
        "fused": fused,
        "skipped": [{"module": path, "reason": why} for path, why in skipped.items()],
    }
    return model, metadata


class _PackedOnce:
    """Packs parameters; one that several layers share, in the same way, once.

    Attributes:
        shared: ``path:name`` of a parameter, and path and name of the one that it shares with.
    """

    def __init__(self, scale_dtype: str) -> None:
        self._scale_dtype = scale_dtype
        self._memory = HugePages()
        self._holders: dict[int, list[tuple[str, str, Quantizer, PackedWeight]]] = {}
        self.shared: dict[str, list[str]] = {}

    def weight(self, path: str, layer: QuantizedLayer, name: str) -> PackedWeight:
        """Return one parameter, packed."""
        quantizer = layer.quantized_parameters()[name]
        own = layer.held_parameter(name)
        alone = name == "weight" and layer.low_rank_up is not None  # less its own branch
        holders = [] if alone else self._holders.setdefault(id(own), [])
        for other_path, other_name, other, weight in holders:
            if _gives_the_same(quantizer, other):
                self.shared[f"{path}:{name}"] = [other_path, other_name]
                return weight
        weight = pack_parameter(layer, name, self._scale_dtype, where=path)
        weight = weight.map(self._memory.moved)
        holders.append((path, name, quantizer, weight))
        return weight


def _gives_the_same(quantizer: Quantizer, other: Quantizer) -> bool:
    """Whether two quantizers give one tensor the same codes and scales."""
    pairs = [(getattr(quantizer, name), getattr(other, name)) for name in BUFFERS]
    return quantizer.config == other.config and all(
        one is two or (one is not None and two is not None and torch.equal(one, two))
        for one, two in pairs
    )


def restore_compress(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Make room for the packed tensors in the place of weights and quantizers.

    Raises:
        CheckpointError: The record does not fit the model.
    """
    made: dict[tuple[object, ...], PackedWeight] = {}
    for path, recorded in metadata["layers"].items():
        layer = layer_named(model, path)
        try:
            record = LayerRecord.from_dict(recorded)
            device = next((p.device for p in layer.parameters()), None)
            weights = {}
            for name, parameter in record.parameters.items():
                key = tuple(metadata["shared"].get(f"{path}:{name}", (path, name)))
                if key not in made or made[key].spec != parameter.spec:
                    made[key] = PackedWeight.allocate(parameter.spec, device)
                weights[name] = made[key]
            _restore_layer(layer, record, weights)
        except (ConfigError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The record of the packed layer {path!r} does not fit this model: {error}"
            ) from error
    _fold_masks(model)
    fuse_as_recorded(model, metadata.get("fused", {}))
    return model


def _fold_masks(model: nn.Module) -> None:
    """Fold the masks of layers that have no quantizers; those of packed ones are in the codes."""
    for layer in list(masked_layers(model).values()):
        if not isinstance(layer, QuantizedLayer):
            remove_masks(layer)


def _restore_layer(layer: nn.Module, record: LayerRecord, weights: dict[str, PackedWeight]) -> None:
    kind = packed_kind(layer) if isinstance(layer, QuantizedLayer) else None
    if kind is None or not isinstance(layer, QuantizedLayer) or not weights:
        raise ConfigError(f"a {type(layer).__name__} cannot be packed like this.")
    dtypes = {layer.own_parameter(name).dtype for name in weights}
    buffers = record.allocate_inputs(dtypes.pop(), layer.parameter_device())
    remove_quantizers(layer)
    remove_masks(layer)
    make_packed(layer, kind, record, weights, buffers)


def packed_kind(layer: QuantizedLayer) -> type[PackedLayer] | None:
    """Return what a quantized layer becomes when it is packed, ``None`` if it cannot be."""
    kind = layer_kind(layer)
    if kind is None or PATCHED in layer.__dict__:
        return None
    if isinstance(layer, OwnForward):
        return PackedLayer  # it runs whatever forward there is
    if kind in PACKED_KINDS:
        return PACKED_KINDS[kind]
    generic = kind.forward is QuantizedLayer.forward
    as_it_is = kind.arranged.__func__ is QuantizedLayer.arranged.__func__  # type: ignore[attr-defined]
    return PackedLayer if generic and as_it_is else None


def pack_parameter(
    layer: QuantizedLayer, name: str, scale_dtype: str = "auto", *, where: str = ""
) -> PackedWeight:
    """Return one quantized parameter, packed; the layer stays as it is.

    Args:
        layer: The layer.
        name: The parameter.
        scale_dtype: ``"float16"``, ``"float32"``, or ``"auto"``: half precision for groups, unless
            a scale is no normal number there.
        where: The layer's path, for messages.

    Raises:
        DataError: It holds values that are not finite.
        ConfigError: Its codes or scales cannot be stored.
    """
    quantizer = layer.quantized_parameters()[name]
    value = layer.to_quantize(name).detach()
    try:
        with_scale = _with_scale(quantizer, value)
    except DataError as error:
        raise DataError(f"The {name} of {where!r} cannot be packed: {error}") from error
    codes, scale = with_scale.codes, with_scale.effective_scale
    if codes is None:
        grouped = quantizer.grouping.split(value)
        numbers = quantize(
            grouped, cast(torch.Tensor, scale), with_scale.zero_point, quantizer.format
        )
        codes = quantizer.grouping.join(encode(numbers, quantizer.format), value.shape)
    stored = cast(torch.Tensor, with_scale.scale)
    matrix = codes.movedim(quantizer.grouping.channel_axis or 0, 0).flatten(1)
    spec = _spec(quantizer, (matrix.shape[0], matrix.shape[1]), stored, scale_dtype)
    return PackedWeight.from_codes(
        spec, matrix.contiguous(), stored, with_scale.zero_point, with_scale.global_scale
    )


def activation_spec(quantizer: Quantizer) -> ActivationSpec:
    """Return what the quantizer of an activation does."""
    config = quantizer.config
    return ActivationSpec(
        format=config.format_name,
        granularity=config.granularity,
        group_size=config.group_size,
        scale_format=config.scale_format,
        calibrated=quantizer.scale is not None,
        scale_rule=config.scale_rule,
    )


def _with_scale(quantizer: Quantizer, value: torch.Tensor) -> Quantizer:
    """Return the quantizer, or one with max scales if it has none."""
    if quantizer.scale is not None:
        return quantizer
    made = Quantizer(quantizer.config, quantizer.grouping.channel_axis)
    made.set_from_tensor(value)
    return made


def _spec(
    quantizer: Quantizer, shape: tuple[int, int], scale: torch.Tensor, scale_dtype: str
) -> PackedSpec:
    config = quantizer.config
    dtype = _SCALE_DTYPES.get(config.scale_format, "float32")
    wanted = "float16" if scale_dtype == "auto" and config.group_size else scale_dtype
    if dtype == "float32" and wanted == "float16" and fits_float16(scale):
        dtype = "float16"
    return PackedSpec(
        format=config.format_name,
        shape=shape,
        granularity=config.granularity,
        group_size=config.group_size,
        block_size=config.block_size,
        scale_format=config.scale_format,
        scale_dtype=dtype,
    )


def _pack_layer(layer: QuantizedLayer, weights: dict[str, PackedWeight]) -> LayerRecord:
    """Turn one layer into a packed one; return what to record of it."""
    activations: dict[str, ActivationSpec] = {}
    buffers: dict[str, torch.Tensor | None] = {}
    for child, name in _ACTIVATIONS.items():
        quantizer = layer.activation_quantizers().get(child)
        if quantizer is None:
            continue
        activations[name] = activation_spec(quantizer)
        buffers.update({f"{name}_{part}": getattr(quantizer, part) for part in INPUT_TENSORS})
    transforms = {name: getattr(layer, name) for name in TRANSFORMS}
    record = LayerRecord(
        parameters={n: _described(layer, n, weight.spec) for n, weight in weights.items()},
        activations=activations,
        transforms={n: tuple(t.shape) for n, t in transforms.items() if t is not None},
        hadamard_size=layer.hadamard_size,
    )
    kind = cast("type[PackedLayer]", packed_kind(layer))
    remove_quantizers(layer)
    remove_masks(layer)
    make_packed(layer, kind, record, weights, {**transforms, **buffers})
    return record


def _described(layer: QuantizedLayer, name: str, spec: PackedSpec) -> PackedParameter:
    """Return how a parameter lies in its matrix."""
    shape = tuple(layer.own_parameter(name).shape)
    if layer_kind(layer) is ExpertsForward:
        return PackedParameter(
            spec, shape, (0, 2, 1) if is_transposed(layer, name) else (0, 1, 2), 2
        )
    axis = layer.channel_axis % max(len(shape), 1)
    return PackedParameter(spec, shape, (axis, *(a for a in range(len(shape)) if a != axis)))


def why_not_packed(model: nn.Module, path: str, layer: QuantizedLayer) -> str | None:
    """Return why ``compress`` would leave a layer as it is; ``None`` if it would pack it."""
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    if layer_kind(layer) is MultiheadAttentionForward:
        return "torch hands its projections to one kernel as plain weights"
    if isinstance(parent, QuantizedLayer) and layer_kind(parent) is MultiheadAttentionForward:
        return "the attention layer that it belongs to is not packed"
    if not layer.quantized_parameters():
        return "it has no quantized weights, only activations"
    if packed_kind(layer) is None:
        return f"no packed layer computes what a {type(layer).__name__} does"
    for child, quantizer in layer.activation_quantizers().items():
        if child not in _ACTIVATIONS or quantizer.global_scale is not None:
            return f"a packed layer has no place for its {child}"
    for name, quantizer in layer.quantized_parameters().items():
        if not quantizer.enabled or quantizer.observer is not None:
            return f"the quantizer of its {name} is switched off"
    return None
