# SPDX-License-Identifier: Apache-2.0
"""Mode ``learned_rounding``: learn how a block is rounded and clipped from what it puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.calibration.driver import Block
from modewright.quantization.algorithms.learned_rounding import LearnedWeight, Schedule, learn
from modewright.quantization.blockwise import OnBlock, walk
from modewright.quantization.config import LearnedRoundingConfig
from modewright.quantization.convert import quantized_layers
from modewright.quantization.passes.records import finish
from modewright.quantization.precision import automatic_precision, usable_precision
from modewright.quantization.quantizer import Quantizer

Metadata = dict[str, Any]
_ROWS_IN_A_STEP = 1024
_REACH = {"sign": 1.0, "adam": 2.0}  # steps of the grid, times the iterations: the rate of offsets
_LONG = 3.0  # how many times the median error of a batch one token's error may count,
_LOST = 30.0  # or this, times the part of the token that is lost over the median part


def convert(
    model: nn.Module,
    config: LearnedRoundingConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
    checkpoint: str | Path | None = None,
) -> tuple[nn.Module, Metadata]:
    """Walk the blocks and learn each one's rounding.

    Raises:
        DataError: There is no calibration data.
    """

    def solve(block: Block) -> Metadata:
        return _solve(block, config)

    precision = "float32" if config.precision == "bfloat16" else config.precision
    blocks = walk(
        model,
        calibration,
        solve,
        mode="learned_rounding",
        precision=precision,
        on_batch=on_batch,
        checkpoint=checkpoint,
        config=config,
    )
    return model, finish(model, blocks)


def _solve(block: Block, config: LearnedRoundingConfig) -> Metadata:
    learned = {
        quantizer: learned_weight(quantizer, layer.to_quantize(parameter).detach())
        for layer in quantized_layers(block.module).values()
        for parameter, quantizer in layer.quantized_parameters().items()
        if not quantizer.config.dynamic
    }
    if not learned:
        return {}
    targets = block.original_outputs()
    generator = torch.Generator().manual_seed(config.seed)
    count = len(block.calls)
    together = config.batch_size or batches_of(sum(map(_rows, targets)), count)
    drawn = [
        torch.randperm(count, generator=generator)[:together].tolist()
        for _ in range(config.iterations)
    ]
    probe = list(range(0, count, max(1, count // config.probe)))[: config.probe]
    device = next((p.device for p in block.module.parameters()), torch.device("cpu"))

    precision = usable_precision(lambda: block.run(block.calls[0]), device, config.precision)

    def loss_on(batches: list[int]) -> torch.Tensor:
        renew()
        with automatic_precision(device, precision):
            return sum(
                (_error(block.run(block.calls[i]), targets[i]) for i in batches),
                start=torch.zeros((), device=device),
            ) / len(batches)

    with substituted(learned) as renew, frozen(block.module):
        with torch.no_grad():
            before = float(loss_on(probe))
        start = [p.detach().clone() for weight in learned.values() for p in weight.parameters]
        schedule = Schedule(
            iterations=config.iterations,
            rate=config.rate or _REACH[config.optimizer] / config.iterations,
            scale_rate=config.scale_rate or config.rate or 1.0 / config.iterations,
            optimizer=config.optimizer,
        )
        learn(list(learned.values()), lambda step: loss_on(drawn[step]), schedule)
        with torch.no_grad():
            after = float(loss_on(probe))
            if not after <= before:  # also if it is not a number
                parameters = [p for weight in learned.values() for p in weight.parameters]
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
    names = []
    for name, layer in quantized_layers(block.module).items():
        for key, quantizer in layer.quantized_parameters().items():
            if quantizer in learned:
                keep(quantizer, learned[quantizer], layer.to_quantize(key).shape)
                names.append(name)
    entry = {"block_error_before": before, "block_error_after": min(before, after)}
    return {name: dict(entry) for name in names}


def batches_of(rows: int, count: int) -> int:
    """Return how many of ``count`` batches with ``rows`` rows in all make a step."""
    return max(1, min(count, round(_ROWS_IN_A_STEP * count / max(rows, 1))))


def _rows(hidden: torch.Tensor) -> int:
    return hidden.numel() // max(hidden.shape[-1], 1)


def learned_weight(quantizer: Quantizer, weight: torch.Tensor) -> LearnedWeight:
    """Return parameters that start at what a quantizer makes of its weight now."""
    if quantizer.scale is None:
        quantizer.set_from_tensor(weight)
    codes = None
    if quantizer.codes is not None:
        codes = quantizer.grouping.split(quantizer.code_values())
    scale = quantizer.effective_scale
    return LearnedWeight(
        quantizer.grouping.split(weight.float()),
        torch.empty(0) if scale is None else scale,
        quantizer.zero_point,
        quantizer.format,
        scale_format=quantizer.config.scale_format,
        global_scale=quantizer.global_scale,
        codes=codes,
    )


def keep(quantizer: Quantizer, weight: LearnedWeight, shape: torch.Size) -> None:
    """Write what was learned into a quantizer: scales, zero points and codes."""
    with torch.no_grad():
        codes, scale, zero_point = weight.codes()
        quantizer.set_scale(scale.detach(), zero_point, quantizer.global_scale)
        quantizer.choose(quantizer.grouping.join(codes, shape))


@contextmanager
def substituted(learned: dict[Quantizer, LearnedWeight]) -> Iterator[Callable[[], None]]:
    """Let quantizers return what the parameters make of their weights.

    A weight is made once for all batches of a step, as is its gradient.

    Yields:
        A function to call when parameters have changed.
    """
    made: dict[Quantizer, torch.Tensor] = {}

    def attach(quantizer: Quantizer, weight: LearnedWeight) -> None:
        def substitute(tensor: torch.Tensor) -> torch.Tensor:
            if quantizer not in made:
                values = quantizer.grouping.join(weight.values(), tensor.shape)
                made[quantizer] = values.to(tensor.dtype)
            return made[quantizer]

        quantizer.substitute = substitute

    try:
        for quantizer, weight in learned.items():
            attach(quantizer, weight)
        yield made.clear
    finally:
        for quantizer in learned:
            quantizer.substitute = None


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keep gradients away from the parameters of a module."""
    switched = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in switched:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


def _error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over tokens, none of which counts far more than the others.

    Some networks have tokens whose hidden state is hundreds of times as long as that of others.
    Their errors are as long and would decide alone; but where most of such a token is lost, all
    later blocks go wrong. So what a token may count grows with the part of it that is lost.
    """
    difference = output.float() - target.to(output.device).float()
    tiny = torch.finfo(torch.float32).tiny
    length = difference.detach().norm(dim=-1, keepdim=True)
    size = target.to(output.device).float().norm(dim=-1, keepdim=True)
    lost = length / (length + size).clamp_min(tiny)
    typical = length.median()
    limit = torch.maximum(typical * _LONG, lost * (typical / lost.median().clamp_min(tiny)) * _LOST)
    weight = (limit / length.clamp_min(tiny)).clamp(max=1.0)
    error: torch.Tensor = ((difference * weight) ** 2).sum(-1).mean()
    return error
