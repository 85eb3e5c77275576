# SPDX-License-Identifier: Apache-2.0
"""Dividing the input of layers by a vector, without leaving a trace in the network if possible.

Whatever makes the input may be able to make it divided already: the gain of a normalization, or the
output channels of a linear layer. Which module that is, and whether anyone else reads what it
makes, is not guessed from names: every module that fits by its shapes is tried, and the block is
run. If it computes what it did, the fold stays; otherwise it is taken back. Where nothing fits, the
layers multiply their inputs themselves (``pre_quant_scale``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from modewright.calibration.driver import Block
from modewright.quantization.blockwise import LayerGroup, as_original
from modewright.quantization.layers import QuantizedLayer

_TOLERANCE = 1e-3  # of what multiplying the weights alone does to the block's output
_TRIAL = 2.0  # by how much a trial scales


@dataclass(frozen=True)
class Fold:
    """A module that can make the input of a group divided by a vector.

    Attributes:
        path: The module's path in the block; empty if the layers do it themselves.
        module: The module.
        repeats: Into how many inputs each of its outputs goes, and how many outputs lie between
            two of them: ``(1, 1)`` for one to one, ``(heads per key head, head size)`` for values
            that several attention heads read.
    """

    path: str
    module: nn.Module | None
    repeats: tuple[int, int] = (1, 1)

    def shared(self, factors: torch.Tensor) -> torch.Tensor:
        """Return factors ``[in]`` made equal (geometric mean) where inputs come from one output."""
        times, size = self.repeats
        if times == 1:
            return factors
        grouped = factors.reshape(-1, times, size)
        return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)

    def outputs(self, factors: torch.Tensor) -> torch.Tensor:
        """Return shared factors of inputs as factors of the module's outputs, ``[out]``."""
        times, size = self.repeats
        return factors.reshape(-1, times, size)[:, 0].reshape(-1)


def find_fold(block: Block, group: LayerGroup) -> Fold:
    """Return the module that can take over the division of a group's input.

    Candidates are tried by scaling every second channel and running the block on its first input.
    """
    features = _features(group)
    trial = torch.ones(features)
    trial[::2] = _TRIAL
    with torch.no_grad(), as_original(block.module):
        expected = block.run(block.calls[0]).float()
        for fold in _candidates(block, group, features):
            with undone(fold, group) as put_back:
                _multiply(group, fold.shared(trial))
                unbalanced = block.run(block.calls[0]).float()
                put_back()
                divide(fold, group, fold.shared(trial))
                error = (block.run(block.calls[0]).float() - expected).abs().mean()
                put_back()
            if error < _TOLERANCE * (unbalanced - expected).abs().mean():
                return fold
    return Fold("", None)


def divide(fold: Fold, group: LayerGroup, factors: torch.Tensor) -> None:
    """Divide the input of a group by factors, and multiply its weights by them.

    Parameters are replaced by new ones; nothing is written into those that are there.

    Args:
        fold: Where the division goes.
        group: The layers.
        factors: ``[in]``, float32; shared as the fold needs it.
    """
    _multiply(group, factors)
    for layer in group.layers.values():
        if fold.module is None:
            before = 1.0 if layer.pre_quant_scale is None else layer.pre_quant_scale
            layer.pre_quant_scale = before / factors.to(layer.weight)
    if fold.module is not None:
        shares = fold.outputs(factors)
        for name in ("weight", "bias"):
            parameter = fold.module._parameters.get(name)
            if parameter is not None:
                shape = (-1,) + (1,) * (parameter.ndim - 1)
                divisor = shares.to(parameter.device).reshape(shape)
                _replace(fold.module, name, (parameter.detach().float() / divisor).to(parameter))


def _multiply(group: LayerGroup, factors: torch.Tensor) -> None:
    """Multiply the weights of a group by factors of its input."""
    for layer in group.layers.values():
        weight = layer.weight_matrix(layer.weight.detach())
        _replace(layer, "weight", layer.from_matrix(weight * factors.to(weight)))


class undone:  # noqa: N801 - a context manager, read as one
    """Remembers what :func:`divide` replaces; the function it returns puts it back."""

    def __init__(self, fold: Fold, group: LayerGroup) -> None:
        modules: list[nn.Module] = list(group.layers.values())
        modules += [] if fold.module is None else [fold.module]
        self._parameters = [(m, dict(m._parameters)) for m in modules]
        self._scales = [(layer, layer.pre_quant_scale) for layer in group.layers.values()]

    def __enter__(self) -> Callable[[], None]:
        return self._put_back

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._put_back()

    def _put_back(self) -> None:
        for module, parameters in self._parameters:
            module._parameters.update(parameters)
        for layer, scale in self._scales:
            layer.pre_quant_scale = scale


def _candidates(block: Block, group: LayerGroup, features: int) -> Iterator[Fold]:
    """Yield modules whose output could be the group's input, the most likely first."""
    own = {id(layer) for layer in group.layers.values()}
    ran = [name for name in _order(block, group) if name]
    sizes = {
        int(size)
        for module in block.module.modules()
        if isinstance(size := getattr(module, "head_dim", None), int) and size > 0
    }
    for name in reversed(ran):
        module = block.module.get_submodule(name)
        weight = module._parameters.get("weight")
        if weight is None or id(module) in own or weight.ndim > 2:
            continue
        if weight.ndim == 2 and not isinstance(module, (nn.Linear, QuantizedLayer)):
            continue
        if weight.ndim == 2 and isinstance(module, QuantizedLayer) and module.channel_axis != 0:
            continue
        outputs = len(weight)
        if outputs == features:
            yield Fold(name, module)
        elif weight.ndim == 2 and features % outputs == 0:
            for size in sorted(sizes):
                if outputs % size == 0:
                    yield Fold(name, module, (features // outputs, size))


def _order(block: Block, group: LayerGroup) -> list[str]:
    """Return the paths of modules that ran before a group, in order."""
    order: list[str] = []
    reached: list[bool] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not reached:
                order.append(name)

        return hook

    handles = [
        module.register_forward_hook(note(name)) for name, module in block.module.named_modules()
    ]
    handles.append(group.first.register_forward_pre_hook(lambda *_: reached.append(True)))
    try:
        block.run(block.calls[0])
    finally:
        for handle in handles:
            handle.remove()
    return order


def _features(group: LayerGroup) -> int:
    layer = group.first
    return int(layer.weight_matrix(layer.weight.detach()).shape[1])


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a new parameter in the place of one; scales of the old one are forgotten."""
    own = module._parameters[name]
    if isinstance(module, QuantizedLayer) and name in module.quantized_parameters():
        module.quantized_parameters()[name].forget()
    trains = own is not None and own.requires_grad
    module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=trains)
