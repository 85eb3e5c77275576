# SPDX-License-Identifier: Apache-2.0
"""Importance without data: batch norms remember what the network saw when it was trained.

A batch norm with scale ``g`` and shift ``b`` puts out numbers with mean ``b`` and deviation
``|g|``, over all that the network was trained on. If every norm draws its output from a normal
distribution like that, whatever comes in, one pass over noise shows what each layer between two
norms gets on average, and how much it varies there. A unit is worth what its variation adds to the
outputs of the layers that take it in, as a part of theirs; its mean can be made up for by the norm
behind the layer. A few images would say more of themselves, and less of all others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from modewright.calibration.forward import evaluating, run_batch
from modewright.errors import DataError
from modewright.pruning.graph.groups import DimensionGroup
from modewright.pruning.norms import tracking_norms

_SAMPLES = 16
Kept = Mapping[str, Mapping[int, torch.Tensor]]


def remembered_costs(
    model: nn.Module, groups: Sequence[DimensionGroup], dummy_input: Any
) -> dict[str, torch.Tensor]:
    """Return what each unit adds to the layers that take it in, ``[units]`` float32 by group.

    It is the part of a layer's output, squared and without its mean, that is lost with the unit, if
    inputs do not depend on each other; summed over the layers that take it in.

    Args:
        model: The network, with batch norms.
        groups: The groups.
        dummy_input: What it can be run on; only its shapes count.

    Raises:
        DataError: No norm keeps statistics, so nothing is remembered.
    """
    variances: dict[str, torch.Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            columns = args[0].detach().float().transpose(0, axis).flatten(1)
            variances[path] = columns.var(1, correction=0)

        return hook

    layers = {piece.module for group in groups for piece in group.consumers if piece.axis == 1}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(note(path)) for path in sorted(layers)
    ]
    try:
        _run_on_noise(model, dummy_input, {})
    finally:
        for handle in handles:
            handle.remove()
    parts = {path: part for path in layers if (part := _parts(model, path, variances)) is not None}
    return {group.name: _summed(group, parts) for group in groups}


def norm_input_means(model: nn.Module, dummy_input: Any, kept: Kept) -> dict[str, torch.Tensor]:
    """Return the mean that comes into each batch norm if norms put out what they remember.

    Args:
        model: The network, or a subnet of it.
        dummy_input: What it can be run on; only its shapes count.
        kept: By path of a parameter of the whole network and axis what the subnet has, if not all:
            the units that are left draw the same numbers as in the whole network.

    Returns:
        By path of the norm, ``[channels]`` float32.
    """
    means: dict[str, torch.Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            means[path] = args[0].detach().float().transpose(0, 1).flatten(1).mean(1)

        return hook

    handles = [norm.register_forward_pre_hook(note(path)) for path, norm in _norms(model).items()]
    try:
        _run_on_noise(model, dummy_input, kept)
    finally:
        for handle in handles:
            handle.remove()
    return means


def _norms(model: nn.Module) -> dict[str, Any]:
    tracking = {id(norm) for norm in tracking_norms(model)}
    return {path: module for path, module in model.named_modules() if id(module) in tracking}


def _run_on_noise(model: nn.Module, dummy_input: Any, kept: Kept) -> None:
    """Run a network whose norms draw what they put out; equal calls draw equal numbers."""
    norms = _norms(model)
    if not norms:
        raise DataError(
            f"{type(model).__name__} has no batch norms that keep statistics, so nothing is "
            "remembered of the data that it was trained on: importance='norms' is for networks "
            "with batch norms. Use 'gradient', with data."
        )
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return torch.randn((_SAMPLES, *value.shape[1:]), generator=generator).to(value)

    with torch.no_grad(), evaluating(model), _drawing(norms, kept):
        run_batch(model, tree_map(noise, dummy_input))


@contextmanager
def _drawing(norms: Mapping[str, Any], kept: Kept) -> Iterator[None]:
    def draw(path: str) -> Any:
        def hook(norm: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            places = kept.get(f"{path}.running_mean", {}).get(0)
            channels = output.shape[1] if places is None else int(places.max()) + 1
            generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
            # channels come first, so that those that are left draw what they drew in the whole
            shape = (channels, output.shape[0], *output.shape[2:])
            drawn = torch.randn(shape, generator=generator)
            drawn = drawn if places is None else drawn[places]
            drawn = drawn.transpose(0, 1).to(output)
            one = (1, -1) + (1,) * (output.ndim - 2)
            if norm.weight is not None:
                drawn = drawn * norm.weight.abs().view(one) + norm.bias.view(one)
            return drawn

        return hook

    handles = [norm.register_forward_hook(draw(path)) for path, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(
    model: nn.Module, path: str, variances: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """Return which part of a layer's variation is each input's, ``[in]``; ``None``: unseen."""
    layer = model.get_submodule(path)
    weight = layer._parameters.get("weight")
    if weight is None or path not in variances or weight.shape[1] != len(variances[path]):
        return None
    cost = weight.detach().float().movedim(1, 0).flatten(1).square().sum(1) * variances[path]
    return (cost / cost.sum().clamp_min(torch.finfo(torch.float32).tiny)).cpu()


def _summed(group: DimensionGroup, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(group.size)
    for piece in group.consumers:
        if piece.axis == 1 and piece.module in parts:
            total += parts[piece.module][piece.indices].sum(1)
    return total
