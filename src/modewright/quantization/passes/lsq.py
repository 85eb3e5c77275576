# SPDX-License-Identifier: Apache-2.0
"""Mode ``lsq``: learn all scales together from the predictions of the original network.

Codes stay as they are; the scales of all weights are moved by gradient descent until the quantized
network's outputs are as close as they come to those of the network that its weights still hold
(Esser et al. 2019, *LSQ*, for learned step sizes; Chen et al. 2024, *EfficientQAT*, for learning
nothing but them at the end). So blocks that were each optimized alone come to fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.calibration.forward import evaluating, run_batch
from modewright.calibration.outputs import main_output
from modewright.errors import DataError
from modewright.quantization.blockwise import OnBlock, as_original
from modewright.quantization.config import LsqConfig
from modewright.quantization.convert import quantized_layers
from modewright.quantization.passes.learned_rounding import batches_of, frozen
from modewright.quantization.passes.records import finish
from modewright.quantization.precision import automatic_precision, usable_precision
from modewright.quantization.quantizer import Quantizer

Metadata = dict[str, Any]
_PROBE = 8  # the last batches: they are only measured on, unless there are few


class _LearnedScale:
    """A weight with fixed codes, whose scales are parameters.

    Attributes:
        factor: ``[rows, groups]``, what the scale is multiplied with.
    """

    def __init__(self, quantizer: Quantizer, weight: torch.Tensor) -> None:
        if quantizer.scale is None:
            quantizer.set_from_tensor(weight)
        if quantizer.codes is None:
            quantizer.choose_nearest(weight)
        steps = quantizer.grouping.split(quantizer.code_values())
        if quantizer.zero_point is not None:
            steps = steps - quantizer.zero_point.unsqueeze(-1)
        scale = quantizer.effective_scale
        self._scale = torch.empty(0) if scale is None else scale
        self._steps = steps.to(torch.bfloat16)  # exact: a code has 8 bits at most
        self._grouping, self._shape = quantizer.grouping, weight.shape
        self.factor = torch.ones_like(self._scale).requires_grad_(True)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        values = self._steps * (self._scale * self.factor).unsqueeze(-1)
        return self._grouping.join(values, self._shape).to(tensor.dtype)

    def keep(self, quantizer: Quantizer) -> None:
        """Write the scales into a quantizer; its codes stay."""
        codes = quantizer.codes
        scale = self._scale * self.factor.detach()
        quantizer.set_scale(scale, quantizer.zero_point, quantizer.global_scale)
        quantizer.codes = codes


class _Made:
    """The weights as scales make them now: made once for all batches of a step.

    Batches are gone through one at a time, so that the activations of one are in memory. They reach
    copies of the weights, whose gradients add up there and go on to the scales at the end.
    """

    def __init__(self) -> None:
        self._weights: dict[_LearnedScale, tuple[torch.Tensor, torch.Tensor]] = {}

    def by(self, scale: _LearnedScale) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what stands for the quantizer of a weight."""

        def substitute(tensor: torch.Tensor) -> torch.Tensor:
            if scale not in self._weights:
                value = scale(tensor)
                self._weights[scale] = value, value.detach().requires_grad_(value.requires_grad)
            return self._weights[scale][1]

        return substitute

    def backward(self) -> None:
        """Pass the gradients of all batches on to the scales, and forget the weights."""
        reached = [(v, leaf.grad) for v, leaf in self._weights.values() if leaf.grad is not None]
        self.clear()
        torch.autograd.backward([v for v, _ in reached], [gradient for _, gradient in reached])

    def clear(self) -> None:
        """Forget the weights."""
        self._weights.clear()


def convert(
    model: nn.Module,
    config: LsqConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
) -> tuple[nn.Module, Metadata]:
    """Learn the scales of all weight quantizers whose scales are float32 numbers.

    Raises:
        DataError: There is no calibration data, or none that can be gone through more than once.
    """
    batches = _batches(calibration)
    learned = {
        quantizer: _LearnedScale(quantizer, layer.to_quantize(parameter).detach())
        for layer in quantized_layers(model).values()
        for parameter, quantizer in layer.quantized_parameters().items()
        if quantizer.config.scale_format == "fp32" and not quantizer.config.dynamic
    }
    if not learned:
        return model, {**finish(model, {}), "loss": []}
    with evaluating(model), frozen(model), _substituted(learned) as made:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        precision = usable_precision(lambda: run_batch(model, batches[0]), device, config.precision)
        config = config.model_copy(update={"precision": precision})
        history = _learn(model, list(learned.values()), made, batches, config, on_batch)
    for quantizer, scale in learned.items():
        scale.keep(quantizer)
    return model, {**finish(model, {}), "loss": history}


def _learn(
    model: nn.Module,
    learned: Sequence[_LearnedScale],
    made: _Made,
    batches: Sequence[object],
    config: LsqConfig,
    on_batch: OnBlock | None,
) -> list[float]:
    """Learn; return the loss on the probe before, and after every epoch. The best one stays."""
    held = min(_PROBE, len(batches) // 4)
    probe, training = (batches[-held:], batches[:-held]) if held else (batches, batches)
    factors = [scale.factor for scale in learned]
    adam = torch.optim.Adam(factors, lr=config.rate, betas=(0.9, 0.95))
    together = config.batch_size or batches_of(sum(map(_size, training)), len(training))
    steps_each = -(-len(training) // together)
    total = steps_each * config.epochs
    adjust = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: max(1 - step / total, 0.01))
    generator = torch.Generator().manual_seed(config.seed)
    best = [f.detach().clone() for f in factors]
    history = [_probe(model, made, probe, config)]
    done = 0
    for _ in range(config.epochs):
        order = torch.randperm(len(training), generator=generator).tolist()
        for start in range(0, len(order), together):
            chosen = order[start : start + together]
            for index in chosen:
                loss = _distance(model, training[index], config) / len(chosen)
                loss.backward()  # type: ignore[no-untyped-call]
            made.backward()
            adam.step()
            adam.zero_grad()
            adjust.step()
            done += 1
            if on_batch is not None:
                on_batch(done, total)
        history.append(_probe(model, made, probe, config))
        if history[-1] == min(history):
            best = [f.detach().clone() for f in factors]
    with torch.no_grad():
        for factor, value in zip(factors, best, strict=True):
            factor.copy_(value)
    return history


def _size(batch: object) -> int:
    """Return how many tokens a batch has: the length of its first tensor of ids or features."""
    items: Any = batch.values() if isinstance(batch, Mapping) else batch
    first = batch if isinstance(batch, torch.Tensor) else next(iter(items))
    return int(first.numel() // (first.shape[-1] if first.is_floating_point() else 1))


def _probe(model: nn.Module, made: _Made, batches: Sequence[object], config: LsqConfig) -> float:
    with torch.no_grad():
        found = sum(float(_distance(model, batch, config)) for batch in batches) / len(batches)
    made.clear()
    return found


def _distance(model: nn.Module, batch: object, config: LsqConfig) -> torch.Tensor:
    """Return how far the quantized network's output is from the original's, on one batch."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with automatic_precision(device, config.precision):
        with torch.no_grad(), as_original(model):
            wanted, are_logits = main_output(run_batch(model, batch), "mode 'lsq'")
        got, _ = main_output(run_batch(model, batch), "mode 'lsq'")
    wanted, got = wanted.detach().float(), got.float()
    if config.loss == "kl" or (config.loss == "auto" and are_logits):
        return F.kl_div(
            F.log_softmax(got, -1).flatten(0, -2),
            F.log_softmax(wanted, -1).flatten(0, -2),
            reduction="batchmean",
            log_target=True,
        )
    return F.mse_loss(got, wanted) / wanted.var().clamp_min(torch.finfo(torch.float32).tiny)


def _batches(calibration: object) -> Sequence[object]:
    if isinstance(calibration, Sequence) and len(calibration):
        return calibration
    raise DataError(
        "mode 'lsq' goes through its data several times: pass a list of batches as "
        f"mode_kwargs={{'calibration': batches}}; received {type(calibration).__name__}."
    )


@contextmanager
def _substituted(learned: dict[Quantizer, _LearnedScale]) -> Iterator[_Made]:
    made = _Made()
    try:
        for quantizer, scale in learned.items():
            quantizer.substitute = made.by(scale)
        yield made
    finally:
        for quantizer in learned:
            quantizer.substitute = None
