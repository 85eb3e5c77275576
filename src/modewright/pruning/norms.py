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

    The variance is that of all values together: what batches differ by is part of it. While they
    run, each is normalized by its own statistics, so batches should be alike: mixed, and large.

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
    moments: dict[int, list[torch.Tensor]] = {id(norm): [] for norm in norms}

    def watch(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        values = args[0].detach().float().transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(values, 1, correction=0)
        moments[id(norm)].append(torch.stack([mean, var + mean.square()]))

    hooks = [norm.register_forward_pre_hook(watch) for norm in norms]
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
        for norm in norms:
            _set_moments(norm, moments[id(norm)])
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, flag in flags:
            module.training = flag


def _set_moments(norm: Any, found: Sequence[torch.Tensor]) -> None:
    """Take mean and variance from the moments of batches; a norm that never ran has none."""
    if not found:
        return
    mean, square = torch.stack(tuple(found)).mean(0)
    norm.running_mean = mean.to(norm.running_mean.dtype)
    norm.running_var = (square - mean.square()).clamp_min(0).to(norm.running_var.dtype)


def shift_means(
    model: nn.Module,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    kept: Mapping[str, Mapping[int, torch.Tensor]],
) -> None:
    """Let batch norms of a subnet make up for the mean of what it lost; buffers are replaced.

    Args:
        model: The subnet.
        before: By path of the norm the mean that came in, in the whole network.
        after: The mean that comes in now.
        kept: By path of a buffer and axis the indices that the subnet has, if not all.
    """
    for path, mean in after.items():
        norm: Any = model.get_submodule(path)
        places = kept.get(f"{path}.running_mean", {}).get(0)
        whole = before[path] if places is None else before[path][places.to(mean.device)]
        norm.running_mean = norm.running_mean + (mean - whole).to(norm.running_mean)


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
