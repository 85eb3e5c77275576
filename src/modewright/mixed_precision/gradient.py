# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of second order: what the rounding of one group does to the predictions.

If a layer's output ``y`` changes by ``d``, the divergence of the predictions grows by
``d^T G d / 2`` up to higher orders, where ``G = J^T F J`` with the Jacobian ``J`` of the logits and
the Fisher information ``F = diag(p) - p p^T`` of the original predictions ``p`` (the Gauss-Newton
matrix; Dong et al. 2020, *HAWQ-V2*, use its trace alone). A random vector ``v`` with covariance
``F`` gives ``g = J^T v`` by one pass backward, and the mean of ``(g . d)^2 / 2`` over positions is
the estimate: with the change that quantizers, really calibrated, make to the real inputs, and with
what the errors of layers in one group have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from modewright.calibration.forward import evaluating, run_batch
from modewright.calibration.outputs import frozen
from modewright.calibration.precision import automatic_precision
from modewright.evaluation.outputs import main_output
from modewright.mixed_precision.observing import called_parts, running_precision
from modewright.mixed_precision.trials import Trial
from modewright.runtime.arguments import on_first

Scores = list[dict[str, float]]
OnStep = Callable[[int, int], None]


def gradient_scores(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    trials: Mapping[str, Mapping[str, Trial]],
    batches: Sequence[object],
    *,
    loss: str = "auto",
    probes: int = 2,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Scores:
    """Return for every group, by candidate, the expected divergence in nats for each position.

    Args:
        model: The original model.
        groups: Paths of layers.
        trials: By layer and candidate what the layer would become.
        batches: Calibration batches.
        loss: ``"kl"`` if outputs are logits, ``"mse"`` for their squared error relative to their
            variance, ``"auto"`` for what the outputs look like.
        probes: Passes backward for each batch.
        seed: Of the random vectors.
        on_step: Called after each batch with how many are done, and how many there are.
    """
    work = _Work(groups, trials)
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    precision = running_precision(model, batches)
    positions = 0
    with evaluating(model), frozen(model), called_parts(), ExitStack() as hooks:
        for path in (path for paths in groups for path in paths):
            layer = model.get_submodule(path)
            hook = layer.register_forward_hook(work.hook(path), with_kwargs=True)
            hooks.callback(hook.remove)
        for number, batch in enumerate(batches, start=1):
            with torch.enable_grad(), automatic_precision(device, precision):
                output, are_logits = main_output(run_batch(model, batch), "auto_quantize")
            kl = loss == "kl" or (loss == "auto" and are_logits)
            work.leading = output.shape[:-1]
            positions += output.shape[:-1].numel() if output.ndim > 1 else 1
            for probe in range(probes):
                vector = random_vector(output.detach().float(), kl, generator)
                output.backward(  # type: ignore[no-untyped-call]
                    vector.to(output.dtype), retain_graph=probe + 1 < probes
                )
                work.settle()
            if on_step is not None:
                on_step(number, len(batches))
    scale = 0.5 / (positions * probes)
    return [{name: value * scale for name, value in row.items()} for row in work.squares]


def random_vector(output: torch.Tensor, kl: bool, generator: torch.Generator) -> torch.Tensor:
    """Return a vector for each position whose covariance is the curvature of the loss there.

    Args:
        output: Logits, or any output, float32 ``[..., features]``.
        kl: Whether the loss is the divergence of what the logits predict.
        generator: Where signs are drawn.
    """
    signs = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8)
    noise = signs.to(output.device).float().mul_(2).sub_(1)
    if kl:
        p = output.softmax(-1)
        spread = p.sqrt() * noise
        return spread - p * spread.sum(-1, keepdim=True)
    variance = output.var().clamp_min(torch.finfo(torch.float32).tiny)
    return noise * (2 / (output.shape[-1] * variance)).sqrt()


class _Work:
    """The products of gradients and changes, summed over the layers of a group.

    Attributes:
        squares: By group and candidate the sum of squares so far.
        leading: The shape of the positions of the output.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], trials: Mapping[str, Mapping[str, Trial]]
    ) -> None:
        self._group = {path: number for number, paths in enumerate(groups) for path in paths}
        self._trials = trials
        self._products: dict[tuple[int, str, torch.Size], torch.Tensor] = {}
        self.squares: Scores = [
            dict.fromkeys((name for p in paths for name in trials.get(p, ())), 0.0)
            for paths in groups
        ]
        self.leading = torch.Size()

    def hook(self, path: str) -> Callable[..., Any]:
        """Return what listens to a layer's output and, later, to its gradient."""

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            args = tuple(v.detach() if torch.is_tensor(v) else v for v in args)
            kwargs = {k: v.detach() if torch.is_tensor(v) else v for k, v in kwargs.items()}

            def listening(tensor: torch.Tensor) -> torch.Tensor:
                # Adding zero makes a result that needs a gradient, though no parameter does.
                heard = tensor + tensor.new_zeros((), requires_grad=True)
                heard.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: self._take(path, args, kwargs, gradient)
                )
                return heard

            return on_first(listening, output)

        return hook

    def settle(self) -> None:
        """Add the squares of what one pass backward gave."""
        for (number, name, _), products in self._products.items():
            self.squares[number][name] += float(products.square().sum(dtype=torch.float64))
        self._products.clear()

    def _take(
        self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: torch.Tensor
    ) -> None:
        number = self._group[path]
        for name, trial in self._trials[path].items():
            product = trial.change(args, kwargs).mul_(gradient.float())
            product = product.flatten(_position_axes(product.shape, self.leading)).sum(-1)
            key = (number, name, product.shape)
            known = self._products.get(key)
            self._products[key] = product if known is None else known + product


def _position_axes(shape: torch.Size, leading: torch.Size) -> int:
    """Return how many leading axes of a layer's output are positions of the model's output."""
    same = 0
    while same < min(len(shape) - 1, len(leading)) and shape[same] == leading[same]:
        same += 1
    return same or len(shape) - 1
