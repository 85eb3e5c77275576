# SPDX-License-Identifier: Apache-2.0
"""``QuantizedLayer``: what a layer becomes when its class is changed in place.

A quantized layer is the same object with a class that is derived from its own: paths, keys of the
state dict and ``isinstance`` stay. Quantizers are its children: ``NAME_quantizer`` for a parameter
``NAME``, ``input_quantizer`` and ``output_quantizer``.

The forward of this class runs the layer's *own* forward. While it runs, reading a quantized
parameter gives its quantized value, and at all other times the parameter; the first floating-point
argument passes through the input quantizer and the first floating-point result through the output
quantizer. So any layer works, whatever its forward does with its weight. Subclasses replace this by
arithmetic of their own where more is to be had.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import nn

from modewright.formats.hadamard import rotate_last
from modewright.layers.masks import masked
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import QuantizerConfig, SchemeConfig
from modewright.runtime.arguments import on_first, on_first_argument

TRANSFORM_BUFFERS = ("pre_quant_scale", "low_rank_down", "low_rank_up")
PATCHED = "_own_forward"  # the forward that was patched onto an instance, and under what name


class _Reading(threading.local):
    """What layers have read in the forward that runs in this thread, by the layer's ``id``."""

    def __init__(self) -> None:
        self.layers: dict[int, dict[tuple[str, bool], torch.Tensor]] = {}


_reading = _Reading()


class QuantizedLayer(nn.Module):
    """Base of the quantized classes: what to do with input, parameters and output.

    Attributes:
        channel_axis: The axis of output channels in the parameters. A transposed convolution with
            groups has those of one group there: channels at the same place share a scale.
        token_inputs: Whether the last axis of input and output is one token's features. A
            convolution sums over positions, so per-token scales cannot be taken out of its sum.
        by_default: Whether mode ``quantize`` picks such layers if no targets are named.
        pre_quant_scale: What the input features are multiplied by before they are quantized
            (``[in]``), or ``None``. Whoever sets it divides the weight, so that the unquantized
            layer computes what it did.
        hadamard_size: Blocks of that many input features are rotated (after they were scaled); 0
            for no rotation. Whoever sets it rotates the weight.
        low_rank_down: ``[rank, in]``, and
        low_rank_up: ``[out, rank]``: a branch in full precision beside the quantized weight, which
            holds what the branch leaves: ``Q(x) Q(W - up down)^T + x (up down)^T``. The stored
            weight stays ``W``.
    """

    channel_axis: ClassVar[int] = 0
    token_inputs: ClassVar[bool] = True
    by_default: ClassVar[bool] = True

    weight: torch.Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None
    pre_quant_scale: torch.Tensor | None
    low_rank_down: torch.Tensor | None
    low_rank_up: torch.Tensor | None
    hadamard_size: int = 0

    # --- what is quantized -----------------------------------------------------------------------

    @classmethod
    def parameter_names(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters of a layer that are quantized."""
        return ("weight",)

    @classmethod
    def fitted(cls, module: nn.Module, scheme: SchemeConfig) -> SchemeConfig:
        """Return what of a scheme such a layer can have."""
        changes: dict[str, QuantizerConfig | None] = {"kv_cache": None}
        for member in () if cls.token_inputs else ("input_activations", "output_activations"):
            quantizer: QuantizerConfig | None = getattr(scheme, member)
            if quantizer is not None and quantizer.granularity in ("token", "group"):
                whole = {"granularity": "tensor", "group_size": None}
                changes[member] = quantizer.model_copy(update=whole)
        return scheme.model_copy(update=changes)

    @classmethod
    def arranged(cls, module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of a parameter's shape in the shape that the quantizer gets."""
        return tensor

    @classmethod
    def rearranged(cls, module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`arranged` returned in the shape of the parameter."""
        return tensor

    def add_quantizers(self, scheme: SchemeConfig) -> None:
        """Make the children, from a scheme that is fitted."""
        for name in ("weight", *type(self).parameter_names(self)):
            setattr(self, f"{name}_quantizer", None)
        for name in type(self).parameter_names(self):
            setattr(self, f"{name}_quantizer", make_quantizer(scheme.weights, self.channel_axis))
        self.input_quantizer = make_quantizer(scheme.input_activations)
        self.output_quantizer = make_quantizer(scheme.output_activations)

    def quantized_parameters(self) -> dict[str, Quantizer]:
        """Return the quantizers of parameters, by the parameter's name."""
        found = {n: self.parameter_quantizer(n) for n in type(self).parameter_names(self)}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def parameter_quantizer(self, name: str) -> Quantizer | None:
        """Return the quantizer of one parameter."""
        return cast("Quantizer | None", getattr(self, f"{name}_quantizer", None))

    def activation_quantizers(self) -> dict[str, Quantizer]:
        """Return all other quantizers of this layer, by the child's name."""
        own = {id(quantizer) for quantizer in self.quantized_parameters().values()}
        return {
            name: child
            for name, child in self._modules.items()
            if isinstance(child, Quantizer) and id(child) not in own
        }

    def parameter_device(self) -> torch.device | None:
        """Return the device of the layer's tensors, ``None`` if it has none."""
        return next((p.device for p in self.parameters()), None)

    # --- values ----------------------------------------------------------------------------------

    def own_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter in full precision, at any time; what a mask holds at zero is zero."""
        return masked(self, name, self.held_parameter(name))

    def held_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter as it is stored: by it, layers that share one are known.

        It is a tensor where pruning put one.
        """
        found = self._parameters.get(name)
        return cast(torch.Tensor, self.__dict__[name] if found is None else found)

    def to_quantize(self, name: str = "weight") -> torch.Tensor:
        """Return what the quantizer of a parameter gets: that from which to take its scales.

        The parameter, less the low-rank branch; that of fused experts as the matrix
        ``[experts * out, in]``.
        """
        parameter = self.own_parameter(name)
        branch = self._branch() if name == "weight" else None
        value = parameter if branch is None else parameter - branch
        return type(self).arranged(self, name, value)

    def quantized_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter in low precision, without a low-rank branch; of its shape."""
        quantizer = self.parameter_quantizer(name)
        if quantizer is None and name == "weight" and self.low_rank_up is not None:
            return type(self).rearranged(self, name, self.to_quantize(name))
        if quantizer is None:
            return self.own_parameter(name)
        return type(self).rearranged(self, name, quantizer(self.to_quantize(name)))

    def effective_parameter(self, name: str) -> torch.Tensor:
        """Return the one parameter that stands for low precision and branch together."""
        value = self.quantized_parameter(name)
        branch = self._branch() if name == "weight" else None
        return value if branch is None else value + branch

    def folded_parameter(self, name: str) -> torch.Tensor:
        """Return what a plain layer needs to compute the same from inputs that are not quantized.

        Scale and rotation of the input are undone on the weight's side.
        """
        value = self.effective_parameter(name)
        if name != "weight" or (self.pre_quant_scale is None and not self.hadamard_size):
            return value
        axis = 1 - self.channel_axis
        value = value.movedim(axis, -1)
        if self.hadamard_size:
            value = rotate_last(value, self.hadamard_size, inverse=True)
        if self.pre_quant_scale is not None:
            value = value * self.pre_quant_scale.to(value.dtype)
        return value.movedim(-1, axis)

    def quantized_weight(self) -> torch.Tensor:
        """Return the weight as the layer's kernel would see it, without a low-rank branch."""
        return self.quantized_parameter("weight")

    def transformed_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the input after scale and rotation: what the stored weight is multiplied with."""
        if self.pre_quant_scale is None and not self.hadamard_size:
            return tensor
        features = tensor.movedim(self.feature_axis, -1)
        if self.pre_quant_scale is not None:
            features = features * self.pre_quant_scale.to(features.dtype)
        if self.hadamard_size:
            features = rotate_last(features, self.hadamard_size)
        return features.movedim(-1, self.feature_axis)

    def quantized_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the input as the layer's kernel would see it."""
        tensor = self.transformed_input(tensor)
        return tensor if self.input_quantizer is None else self.input_quantizer(tensor)

    def quantized_output(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the output as the next layer would see it."""
        return tensor if self.output_quantizer is None else self.output_quantizer(tensor)

    # --- the weight as a matrix, for calibration algorithms --------------------------------------

    @property
    def feature_axis(self) -> int:
        """The axis of features in the input, from the end."""
        return -1

    @property
    def has_rows(self) -> bool:
        """Whether the weight is one matrix that multiplies rows of inputs.

        Only then :meth:`input_rows` returns them, and scale, rotation and branch may be set.
        """
        return False

    @property
    def columns_per_feature(self) -> int:
        """How many columns of the matrix belong to one input feature: the size of a kernel."""
        return 1

    def weight_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the weight, or a tensor of its shape such as codes, as ``[out, in]``."""
        return tensor.movedim(self.channel_axis, 0).flatten(1)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the inverse of :meth:`weight_matrix`: a tensor of the weight's shape."""
        shape = self.own_parameter("weight").shape
        axis = self.channel_axis
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return matrix.reshape(moved).movedim(0, axis).contiguous()

    def input_rows(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the rows that :meth:`weight_matrix` of the weight multiplies.

        Args:
            x: What the weight sees: what :meth:`transformed_input` or :meth:`quantized_input`
                returned.

        Returns:
            ``[n, in]`` float32, detached; ``None`` for a layer that is no product with one matrix.
        """
        return None

    def transforms(self) -> dict[str, Any]:
        """Return what :meth:`allocate_transforms` takes: JSON, empty if nothing is set."""
        found = {name: getattr(self, name) for name in TRANSFORM_BUFFERS}
        recorded: dict[str, Any] = {n: list(t.shape) for n, t in found.items() if t is not None}
        return {**recorded, "hadamard_size": self.hadamard_size} if self.hadamard_size else recorded

    def allocate_transforms(self, recorded: dict[str, Any]) -> None:
        """Make room for scale and branch, whose values are loaded later, and set the rotation.

        Args:
            recorded: What :meth:`transforms` returned for the layer that was saved.
        """
        weight = self.own_parameter("weight")
        for name in TRANSFORM_BUFFERS:
            shape = recorded.get(name)
            made = None if shape is None else weight.detach().new_full(tuple(shape), torch.nan)
            setattr(self, name, made)
        self.hadamard_size = int(recorded.get("hadamard_size", 0))

    def _branch(self) -> torch.Tensor | None:
        """Return ``up @ down`` in the shape of the weight."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        return self.from_matrix(self.low_rank_up @ self.low_rank_down)

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward on what quantization leaves of input and parameters."""
        args, kwargs = on_first_argument(self.quantized_input, args, kwargs)
        with self.reading():
            result = self.own_forward(*args, **kwargs)
        return on_first(self.quantized_output, result)

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The forward that the layer had: of its class, or one that was patched onto it."""
        if PATCHED in self.__dict__:
            return cast("Callable[..., Any]", self.__dict__[PATCHED][1])
        return cast("Callable[..., Any]", own_class(type(self)).forward.__get__(self))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let parameters of this layer, and of its children, be read in low precision."""
        layers = [self, *(c for c in self.children() if isinstance(c, QuantizedLayer))]
        entered = [id(layer) for layer in layers if id(layer) not in _reading.layers]
        _reading.layers.update({key: {} for key in entered})
        try:
            yield
        finally:
            for key in entered:
                del _reading.layers[key]


class OwnForward(QuantizedLayer):
    """Comes before the class of a kind where a subclass or the instance has its own forward."""

    forward = QuantizedLayer.forward


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a layer had before it was quantized."""
    return cast("type[nn.Module]", cls.__bases__[-1])


def parameter_property(name: str) -> property:
    """Return a property that reads a parameter, in low precision while the forward runs."""

    def read(self: QuantizedLayer) -> torch.Tensor | None:
        if name not in self._parameters and name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        held = self._parameters if name in self._parameters else self.__dict__
        value = cast("torch.Tensor | None", held[name])
        seen = _reading.layers.get(id(self))
        if value is None:
            return None
        if seen is None:
            return self.own_parameter(name)
        key = (name, torch.is_grad_enabled())
        if key not in seen:
            seen[key] = self.effective_parameter(name)
        return seen[key]

    def write(self: QuantizedLayer, value: torch.Tensor) -> None:
        self.__dict__[name] = value

    def delete(self: QuantizedLayer) -> None:
        del self.__dict__[name]

    return property(read, write, delete)


def make_quantizer(
    config: QuantizerConfig | None, channel_axis: int | None = None
) -> Quantizer | None:
    """Return a quantizer, or ``None`` for one that is off."""
    return None if config is None else Quantizer(config, channel_axis)
