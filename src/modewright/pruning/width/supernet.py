# SPDX-License-Identifier: Apache-2.0
"""Training of subnets that share weights, so that any of them can be scored as it is.

Every step follows the sandwich rule (Yu et al. 2020, BigNAS): the whole network, the smallest
subnet and some random ones are run on the same batch, and their gradients are summed. Random
choices depend on the number of the step alone, so that training which goes on takes the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modewright.calibration.calls import first_tensor
from modewright.calibration.forward import evaluating, run_batch
from modewright.errors import DataError

LossFunc = Callable[[nn.Module, Any], torch.Tensor]


class Distillation:
    """The loss of a subnet against what the network put out before any training.

    Args:
        model: The network, untrained.
        batches: What it will be trained on.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        with torch.no_grad(), evaluating(model):
            self._targets = {id(b): _scores(run_batch(model, b)).detach() for b in batches}
        self._batches = batches  # held, so that ids stay theirs

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return KL(before || now) of scores ``[..., classes]``; of others the squared distance."""
        target, now = self._targets[id(batch)], _scores(run_batch(model, batch))
        if now.ndim < 2:
            return (now - target).square().mean()
        rows = now.flatten(0, -2).log_softmax(-1)
        wanted = target.flatten(0, -2).log_softmax(-1)
        return nn.functional.kl_div(rows, wanted, log_target=True, reduction="batchmean")


def _scores(output: Any) -> torch.Tensor:
    found = getattr(output, "logits", None)
    found = first_tensor(output) if found is None else found
    if found is None:
        raise DataError("The network puts out no tensor, so it cannot be trained by distillation.")
    return found.float()


class SupernetTraining:
    """Stochastic gradient descent with momentum on weights that subnets share.

    Args:
        model: The network, its search space open.
        batches: What it is trained on, one after the other, again and again.
        loss_func: ``(model, batch) -> tensor``.
        learning_rate: At the start; it falls along a cosine to zero.
        momentum: Of the gradients.
        steps: How many steps there will be.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        loss_func: LossFunc,
        *,
        learning_rate: float,
        momentum: float,
        steps: int,
    ) -> None:
        self._model, self._batches, self._loss_func = model, batches, loss_func
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.SGD(self._parameters.values(), learning_rate, momentum)
        self._learning_rate, self._steps = learning_rate, steps

    def step(self, number: int, subnets: Sequence[Callable[[], None]]) -> float:
        """Train one step; return the mean loss.

        Args:
            number: Of the step, from 0.
            subnets: Called before each run; sets the network to a subnet.
        """
        batch = self._batches[number % len(self._batches)]
        rate = 0.5 * (1 + torch.tensor(torch.pi * number / self._steps).cos().item())
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * rate
        self._optimizer.zero_grad()
        total = 0.0
        self._model.train()
        for choose in subnets:
            choose()
            with torch.enable_grad():
                loss = self._loss_func(self._model, batch) / len(subnets)
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def velocity(self) -> dict[str, torch.Tensor]:
        """Return the momentum of every parameter, by path."""
        found = {}
        for path, parameter in self._parameters.items():
            buffer = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                found[path] = buffer
        return found

    def set_velocity(self, velocity: Mapping[str, torch.Tensor]) -> None:
        """Go on with a momentum that was kept."""
        for path, buffer in velocity.items():
            self._optimizer.state[self._parameters[path]]["momentum_buffer"] = buffer.clone()
