# SPDX-License-Identifier: Apache-2.0
"""Statistics of batch norms, gathered anew for a network that was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modewright.calibration.forward import run_batch


def tracking_norms(model: nn.Module) -> list[Any]:
    """Return the batch norms that keep statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
    ]


def recalibrate_norms(
    model: nn.Module,
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], object] = run_batch,
) -> None:
    """Gather the statistics of batch norms anew; buffers are replaced, not written into.

    Args:
        model: The network. Train flags are put back.
        batches: What it is run on; every batch counts the same.
        run: Runs the network on one batch.
    """
    norms = tracking_norms(model)
    if not norms or not batches:
        return
    flags = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.training, norm.momentum = True, None  # none: a plain mean over all batches
            norm.running_mean = torch.zeros_like(norm.running_mean)
            norm.running_var = torch.ones_like(norm.running_var)
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, flag in flags:
            module.training = flag


def norm_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the means and variances that batch norms keep, by path."""
    norms = {id(norm) for norm in tracking_norms(model)}
    return {
        f"{path}.{name}" if path else name: getattr(module, name)
        for path, module in model.named_modules()
        if id(module) in norms
        for name in ("running_mean", "running_var")
    }


def set_norm_statistics(
    model: nn.Module,
    statistics: Mapping[str, torch.Tensor],
    kept: Mapping[str, Mapping[int, torch.Tensor]],
) -> None:
    """Give a whole network the statistics of a subnet; buffers are replaced.

    Args:
        model: The network.
        statistics: What :func:`norm_statistics` returned of the subnet.
        kept: By path of a buffer and axis the indices that the subnet has, if not all.
    """
    for path, values in statistics.items():
        holder, _, name = path.rpartition(".")
        module = model.get_submodule(holder)
        whole = getattr(module, name).clone()
        places = kept.get(path, {}).get(0)
        whole[slice(None) if places is None else places.to(whole.device)] = values
        setattr(module, name, whole)
