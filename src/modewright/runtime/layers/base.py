# SPDX-License-Identifier: Apache-2.0
"""``PackedLayer``: what a layer becomes when its parameters are packed.

A packed layer is the same object with a class that is derived from its own: paths and
``isinstance`` stay. In the place of a parameter ``NAME`` it holds the buffers ``NAME_packed``,
``NAME_scale``, ``NAME_zero_point`` and ``NAME_global_scale`` (those that the format has), and
reading ``NAME`` gives what they stand for, made anew each time. So any layer works, whatever its
forward does with its weight; subclasses replace this by arithmetic on the packed weight.

What the layer had for its inputs it keeps: ``pre_quant_scale``, the size of a rotation, a branch of
low rank, and the scale of calibrated inputs (``input_scale``, ``input_zero_point``).

Packed tensors and their scales keep their dtypes when the model is cast; :attr:`compute_dtype`
follows. Layers that share a parameter share the packed tensors, wherever they are moved together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from modewright.errors import ConfigError
from modewright.formats.hadamard import rotate_last
from modewright.runtime.arguments import on_first, on_first_argument
from modewright.runtime.layers.record import TRANSFORMS, LayerRecord
from modewright.runtime.packed_weight import TENSORS, PackedWeight

if TYPE_CHECKING:
    from typing_extensions import Self

_TWIN = "_modewright_moved_to"


class PackedLayer(nn.Module):
    """Base of the packed classes.

    Attributes:
        record: What is packed, and how inputs and outputs are quantized.
        compute_dtype: The dtype that parameters have when they are read.
        pre_quant_scale: What input features are multiplied by, ``[in]``, or ``None``.
        low_rank_down: ``[rank, in]``, and
        low_rank_up: ``[out, rank]``: a branch in full precision, or ``None``.
    """

    record: LayerRecord
    compute_dtype: torch.dtype
    pre_quant_scale: torch.Tensor | None
    low_rank_down: torch.Tensor | None
    low_rank_up: torch.Tensor | None

    # --- parameters ------------------------------------------------------------------------------

    def packed_weight(self, name: str = "weight") -> PackedWeight:
        """Return the packed matrix of a parameter; the same object while its tensors are.

        Raises:
            ConfigError: Tensors were put in their place that do not fit.
        """
        buffers = self._buffers
        kept: dict[str, PackedWeight] = self.__dict__["_weights"]
        held = kept.get(name)
        if (
            held is None
            or held.packed is not buffers[name + "_packed"]
            or held.scale is not buffers[name + "_scale"]
        ):
            tensors: dict[str, Any] = {part: buffers[f"{name}_{part}"] for part in TENSORS}
            held = PackedWeight(self.record.parameters[name].spec, **tensors)
            kept[name] = held
        return held

    def read_parameter(self, name: str) -> torch.Tensor:
        """Return what a packed parameter stands for, in its shape and ``compute_dtype``."""
        value = self.quantized_parameter(name)
        branch = self.branch_weight() if name == "weight" else None
        return value if branch is None else value + branch

    def quantized_parameter(self, name: str) -> torch.Tensor:
        """Return what :meth:`read_parameter` does, without a branch of low rank."""
        parameter = self.record.parameters[name]
        return parameter.from_matrix(self.packed_weight(name).dequantize(dtype=self.compute_dtype))

    def branch_weight(self) -> torch.Tensor | None:
        """Return the branch of low rank in the shape of the weight."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        branch = self.low_rank_up @ self.low_rank_down
        return self.record.parameters["weight"].from_matrix(branch).contiguous()

    def plain_parameter(self, name: str) -> torch.Tensor:
        """Return what a plain layer needs to compute the same from inputs that are not quantized.

        Scale and rotation of the input are undone on the weight's side.
        """
        value = self.read_parameter(name)
        size = self.record.hadamard_size
        if name != "weight" or (self.pre_quant_scale is None and not size):
            return value
        axis = self.record.parameters[name].feature_axis
        value = value.movedim(axis, -1)
        if size:
            value = rotate_last(value, size, inverse=True)
        if self.pre_quant_scale is not None:
            value = value * self.pre_quant_scale.to(value.dtype)
        return value.movedim(-1, axis)

    # --- inputs and outputs ----------------------------------------------------------------------

    @property
    def feature_axis(self) -> int:
        """The axis of features in the input, from the end."""
        return -1

    def transformed_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the input after scale and rotation: what the stored weight is multiplied with."""
        size = self.record.hadamard_size
        if self.pre_quant_scale is None and not size:
            return tensor
        features = tensor.movedim(self.feature_axis, -1)
        if self.pre_quant_scale is not None:
            features = features * self.pre_quant_scale.to(features.dtype)
        if size:
            features = rotate_last(features, size)
        return features.movedim(-1, self.feature_axis)

    def simulated(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return an input or output as low precision leaves it."""
        spec = self.record.activations.get(name)
        if spec is None:
            return tensor
        buffers = self._buffers
        return spec.simulate(
            tensor, buffers.get(f"{name}_scale"), buffers.get(f"{name}_zero_point")
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on what quantization leaves of input and parameters."""

        def seen(tensor: torch.Tensor) -> torch.Tensor:
            return self.simulated("input", self.transformed_input(tensor))

        args, kwargs = on_first_argument(seen, args, kwargs)
        result = own_class(type(self)).forward(self, *args, **kwargs)
        return on_first(lambda tensor: self.simulated("output", tensor), result)

    # --- a module like others --------------------------------------------------------------------

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse another parameter in the place of a packed one.

        Raises:
            ConfigError: The parameter is packed.
        """
        record = self.__dict__.get("record")
        if record is not None and name in record.parameters:
            raise ConfigError(
                f"{name!r} of this {type(self).__name__} is packed and cannot be replaced. Apply "
                "the mode 'decompress' first."
            )
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move everything, cast what is not packed, and take note of the dtype."""
        names = [n for n in self.record.buffers() if n in self._buffers]
        packed = {name: self._buffers.pop(name) for name in names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            moved = {n: None if t is None else _moved(t, fn) for n, t in packed.items()}
        except BaseException:
            self._buffers.update(packed)
            raise
        device = next(t.device for t in packed.values() if t is not None)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        self._buffers.update(moved)
        self.__dict__["_weights"] = {}
        return self

    def was_packed(self) -> None:
        """Do what else such a layer needs once its parameters are packed."""

    def extra_repr(self) -> str:
        """Return what the plain layer says, and what is packed."""
        own = own_class(type(self)).extra_repr(self)
        packed = [f"{n}: {p.spec}" for n, p in self.record.parameters.items()]
        inputs = [f"{n}: {a.format} {a.granularity}" for n, a in self.record.activations.items()]
        return "; ".join([*([own] if own else []), *packed, *inputs])


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a layer had before it was packed."""
    return cast("type[nn.Module]", cls.__bases__[-1])


def make_packed(
    layer: nn.Module,
    kind: type[PackedLayer],
    record: LayerRecord,
    weights: dict[str, PackedWeight],
    buffers: dict[str, torch.Tensor | None] | None = None,
) -> PackedLayer:
    """Change the class of a plain layer in place, and put packed tensors where parameters were.

    Args:
        layer: A layer that holds the parameters that the record names.
        kind: What it becomes.
        record: What is packed.
        weights: By the name of the parameter; layers that share one get the same objects.
        buffers: ``pre_quant_scale`` and whatever else belongs to the inputs.

    Raises:
        ConfigError: The layer has no such parameter, or one of another shape.
    """
    dtype = None
    for name, packed in record.parameters.items():
        own = layer._parameters.get(name)
        if own is None or tuple(own.shape) != packed.shape:
            found = "none" if own is None else str(list(own.shape))
            raise ConfigError(
                f"expected a parameter {name!r} of shape {list(packed.shape)} in a "
                f"{type(layer).__name__}; it has {found}."
            )
        dtype = own.dtype
    for name in record.parameters:
        del layer._parameters[name]
    layer.__dict__["record"] = record
    layer.__dict__["compute_dtype"] = dtype or torch.get_default_dtype()
    layer.__dict__["_weights"] = dict(weights)
    layer.__class__ = _packed_class(type(layer), kind, tuple(record.parameters))  # type: ignore[arg-type]
    for name, weight in weights.items():
        for part in TENSORS:
            layer.register_buffer(f"{name}_{part}", getattr(weight, part))
    for name, buffer in (buffers or {}).items():
        layer.register_buffer(name, buffer)
    made = cast(PackedLayer, layer)
    made.was_packed()
    return made


def make_plain(layer: PackedLayer, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """Give a layer its own class back, with parameters where packed tensors were."""
    record = layer.record
    for name in (*record.buffers(), *TRANSFORMS):
        layer._buffers.pop(name, None)
    for name in ("record", "compute_dtype", "_weights", "is_product"):
        layer.__dict__.pop(name, None)
    layer.__class__ = own_class(type(layer))  # type: ignore[assignment]
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
    return layer


@cache
def _packed_class(
    cls: type[nn.Module], kind: type[PackedLayer], names: tuple[str, ...]
) -> type[PackedLayer]:
    """Return the class that a layer of class ``cls`` gets, a subclass of ``cls``."""
    namespace: dict[str, object] = {
        "__module__": __name__,
        "__doc__": f"Packed {cls.__name__}.",
        **{name: _parameter_property(name) for name in names},
    }
    return cast("type[PackedLayer]", type(f"Packed{cls.__name__}", (kind, cls), namespace))


def _parameter_property(name: str) -> property:
    def read(self: PackedLayer) -> torch.Tensor:
        if f"{name}_packed" not in self._buffers:
            raise AttributeError(f"{name!r} is being moved")
        return self.read_parameter(name)

    return property(read)


def _moved(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a packed tensor where ``fn`` puts it, of the dtype that it has.

    If another layer holds the same tensor and was moved before, they share the result too.
    """
    moved = fn(tensor)
    if moved.dtype != tensor.dtype:
        moved = tensor.to(moved.device)
    if moved is tensor:
        return tensor
    kept: weakref.ref[torch.Tensor] | None = getattr(tensor, _TWIN, None)
    twin = None if kept is None else kept()
    if twin is not None and twin.device == moved.device:
        return twin
    setattr(tensor, _TWIN, weakref.ref(moved))
    return moved
