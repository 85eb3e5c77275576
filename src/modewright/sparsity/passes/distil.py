# SPDX-License-Identifier: Apache-2.0
"""Training what is kept on the original network's outputs, with the masks fixed.

Layers that were solved one by one come to fit together, and what none of them could make up for
alone is made up for by all (Hinton et al. 2015, for learning from another network's predictions).
The weights of sparse layers are trained, biases, and the gains of normalizations; embeddings stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from modewright.calibration.blockwise import OnBlock
from modewright.calibration.forward import evaluating
from modewright.calibration.outputs import batches_in_step, frozen, output_distance
from modewright.calibration.precision import Precision
from modewright.layers.masks import masked_layers
from modewright.sparsity.config import CalibratedSparseConfig
from modewright.sparsity.passes.original import Original

_PROBE = 8  # the last batches: they are only measured on, unless there are few
_WARM_UP = 8  # steps in which the rate rises


def distil(
    model: nn.Module,
    original: Original,
    batches: Sequence[object],
    config: CalibratedSparseConfig,
    precision: Precision,
    on_batch: OnBlock | None = None,
) -> list[float]:
    """Train the kept weights; return the loss on held-back data before, and after every epoch.

    The weights that were best on the held-back data stay.
    """
    held = min(_PROBE, len(batches) // 4)
    probe, training = (batches[-held:], batches[:-held]) if held else (batches, batches)
    together = config.batch_size or batches_in_step(training)
    total = -(-len(training) // together) * config.epochs
    generator = torch.Generator().manual_seed(config.seed)

    def distance(batch: object) -> torch.Tensor:
        return output_distance(model, batch, original, loss=config.loss, precision=precision)

    def measured() -> float:
        with torch.no_grad():
            return sum(float(distance(batch)) for batch in probe) / len(probe)

    with evaluating(model), frozen(model):
        trained = _renewed(model)
        adam = torch.optim.Adam(trained, lr=config.rate, betas=(0.9, 0.95))
        adjust = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1.0, (step + 1) / _WARM_UP) * max(1 - step / total, 0.0)
        )
        history, best = [measured()], [p.detach().clone() for p in trained]
        done = 0
        for _ in range(config.epochs):
            order = torch.randperm(len(training), generator=generator).tolist()
            for start in range(0, len(order), together):
                chosen = order[start : start + together]
                for index in chosen:
                    loss = distance(training[index]) / len(chosen)
                    loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
                adam.zero_grad()
                adjust.step()
                done += 1
                if on_batch is not None:
                    on_batch(done, total)
            history.append(measured())
            if history[-1] == min(history):
                best = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for parameter, value in zip(trained, best, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)
    return history


def _renewed(model: nn.Module) -> list[nn.Parameter]:
    """Put copies in the place of what is trained, so that the original stays; return them."""
    sparse = set(masked_layers(model).values())
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if module in sparse or parameter.ndim <= 1:
                if parameter not in made:
                    made[parameter] = nn.Parameter(parameter.detach().clone())
                module._parameters[name] = made[parameter]
    return list(made.values())
