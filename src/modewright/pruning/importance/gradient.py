# SPDX-License-Identifier: Apache-2.0
"""Importance by gradient: what the loss would feel if a unit were turned down.

A gate of 1 in front of everything that takes a unit in leaves the network as it is; the gradient
of the loss with respect to the gate is the sum of weight times gradient over these weights. Its
square, summed over data, estimates how much the loss grows without the unit (Theis et al. 2018,
Molchanov et al. 2019: the diagonal of the Fisher matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from modewright.calibration.calls import first_tensor
from modewright.calibration.forward import evaluating, run_batch
from modewright.errors import DataError
from modewright.pruning.graph.groups import DimensionGroup, Slice

LossFunc = Callable[[nn.Module, Any], torch.Tensor]


def gradients(
    model: nn.Module,
    groups: Sequence[DimensionGroup],
    batches: Iterable[Any],
    loss_func: LossFunc | None = None,
) -> dict[str, torch.Tensor]:
    """Return for every group the mean squared gradient of its units' gates, ``[units]`` float32.

    Args:
        model: The network; it is run in eval mode, gradients that it holds are left alone.
        groups: The groups.
        batches: What it is run on. The fewer samples are in one, the better the estimate, see
            :func:`single_samples`.
        loss_func: Called with the model and a batch; by default the loss of labels that are drawn
            from the network's own predictions, which needs none and gives the true Fisher matrix.

    Raises:
        DataError: There are no batches.
    """
    total = {group.name: torch.zeros(group.size) for group in groups}
    tensors = dict(model.named_parameters())
    wanted = {p.tensor: tensors[p.tensor] for group in groups for p in gates(group)}
    flags = {path: tensor.requires_grad for path, tensor in wanted.items()}
    seen = 0
    try:
        for tensor in wanted.values():
            tensor.requires_grad_(True)
        for batch in batches:
            seen += 1
            with evaluating(model), torch.enable_grad():
                loss = (loss_func or drawn_label_loss)(model, batch)
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            products = {
                path: None if g is None else (tensor.detach() * g).float()
                for (path, tensor), g in zip(wanted.items(), found, strict=True)
            }
            for group in groups:
                total[group.name] += _of_gates(group, products).square()
    finally:
        for path, tensor in wanted.items():
            tensor.requires_grad_(flags[path])
    if not seen:
        raise DataError(
            "Importance by gradient needs data: pass calibration=batches. There were none."
        )
    return {name: sums / seen for name, sums in total.items()}


def single_samples(batches: Iterable[Any], count: int) -> list[Any]:
    """Return at most ``count`` batches of one sample each, cut out of larger ones.

    Args:
        batches: Tensors, or tuples, lists or dicts of tensors with the same first dimension; what
            has another form stays as it is.
        count: How many at most.
    """
    found: list[Any] = []
    for batch in batches:
        leaves, shape = tree_flatten(batch)
        lengths = {len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}
        if len(lengths) != 1:
            found.append(batch)
            continue
        for i in range(lengths.pop()):
            cut = [x[i : i + 1] if isinstance(x, torch.Tensor) and x.ndim else x for x in leaves]
            found.append(tree_unflatten(cut, shape))
            if len(found) == count:
                return found
    return found[:count]


def gates(group: DimensionGroup) -> tuple[Slice, ...]:
    """Return where a unit can be turned down: what takes it in, or, of experts, what makes it."""
    found = group.consumers or group.producers
    return tuple(piece for piece in found if not piece.tensor.endswith(("_mean", "_var")))


def _of_gates(group: DimensionGroup, products: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
    gradient = torch.zeros(group.size)
    for piece in gates(group):
        product = products[piece.tensor]
        if product is not None:
            rows = product.movedim(piece.axis, 0).flatten(1).sum(1).cpu()
            gradient += rows[piece.indices].sum(1)
    return gradient


def drawn_label_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean cross-entropy of labels that are drawn from the predictions themselves.

    Raises:
        DataError: The network puts out no scores ``[..., classes]``.
    """
    output = run_batch(model, batch)
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    if logits is None or logits.ndim < 2 or not logits.is_floating_point():
        raise DataError(
            "Without loss_func, importance by gradient needs a network that puts out scores "
            "[..., classes]. Pass loss_func=(model, batch) -> tensor."
        )
    rows = logits.flatten(0, -2).float()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = torch.multinomial(rows.softmax(-1), 1)[:, 0]
    return nn.functional.cross_entropy(rows, labels)
