# SPDX-License-Identifier: Apache-2.0
"""``trace_dimensions``: run a network once, find its groups, and prove each by cutting it.

The proof: a few units of every group are cut for trial. The network must run, its outputs must have
the same shapes, and where that is exact, be the outputs of the whole network in which nothing takes
these units in. A group that fails is left alone and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from modewright.calibration.forward import evaluating
from modewright.errors import DataError
from modewright.evaluation.cost import call_model
from modewright.modes.model_like import all_modules
from modewright.modes.snapshot import Snapshot
from modewright.pruning.graph.grouping import build_groups
from modewright.pruning.graph.groups import DimensionGraph, DimensionGroup
from modewright.pruning.graph.rules import RULES, broadcast
from modewright.pruning.graph.tracer import Tracer
from modewright.pruning.surgery import keep, silence

_PASSES = 4
_TOLERANCE = 1e-3
_MULTIPLE = 8
_NOT_A_COUNT = re.compile(r"head_dim|head_size|groups|kernel|stride|top_k|layer|eps")


def trace_dimensions(model: nn.Module, dummy_input: Any) -> DimensionGraph:
    """Find the dimensions of a network that can be cut, and what must be cut together.

    Args:
        model: The network. It is run in eval mode, a few times, and left as it was.
        dummy_input: What one call of it gets: a tensor, a tuple, or a dict of keywords.

    Returns:
        The groups, and what is left alone with the reason.

    Raises:
        DataError: The network puts out no tensor.
    """
    with evaluating(model), torch.no_grad():
        trace = _traced(model, dummy_input)
        groups, alone = build_groups(trace)
        groups = [replace(g, attributes=_counts(g)) for g in groups]
        proven, failed = _proven(model, dummy_input, groups)
    return DimensionGraph(tuple(proven), {**failed, **alone})


def _traced(model: nn.Module, dummy_input: Any) -> Tracer:
    """Trace; where reshapes have several candidates for units, try others for those that froze."""
    choices: dict[int, int] = {}
    for _ in range(_PASSES):
        trace = Tracer(model, RULES, broadcast, choices)
        with trace.following():
            output = call_model(model, dummy_input)
        outputs = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor)]
        if not outputs:
            raise DataError("The network puts out no tensor, so its dimensions cannot be traced.")
        for tensor in outputs:
            trace.freeze(tensor, "it is an output of the network")
        components = trace.atoms.solve()
        better = {
            number: choices.get(number, 0) + 1
            for number, (ids, candidates) in trace.splits.items()
            if choices.get(number, 0) + 1 < candidates and components.is_frozen(ids)
        }
        if not better:
            break
        choices = {**choices, **better}
    return trace


def _plain(output: Any) -> Any:
    """Return the values of outputs that are mappings of their own kind (Transformers')."""
    return list(output.values()) if isinstance(output, Mapping) else output


def _counts(group: DimensionGroup) -> tuple[Any, ...]:
    """Return the attributes that by their names count units."""
    return tuple(a for a in group.attributes if not _NOT_A_COUNT.search(a.name) or _is_sum(a.name))


def _is_sum(name: str) -> bool:
    return name.startswith(("all_", "num_attention_heads"))


def _proven(
    model: nn.Module, dummy_input: Any, groups: Sequence[DimensionGroup]
) -> tuple[list[DimensionGroup], dict[str, str]]:
    """Return the groups that can be cut, and why others cannot."""
    if _problem(model, dummy_input, groups) is None:
        return list(groups), {}
    proven, failed = [], {}
    for group in groups:
        problem = _problem(model, dummy_input, [group])
        variants = iter(_variants(group))
        while problem is not None and (variant := next(variants, None)) is not None:
            if _problem(model, dummy_input, [variant]) is None:
                group, problem = variant, None
        if problem is None:
            proven.append(group)
        else:
            failed[group.name] = problem
    together = _problem(model, dummy_input, proven)
    if together is not None:  # each can be cut, but not all: cut none that others depend on
        return [], {**failed, **{group.name: f"with others {together}" for group in proven}}
    return proven, failed


def _variants(group: DimensionGroup) -> Iterator[DimensionGroup]:
    """Yield what else a group may be that does not work as it is."""
    if group.size >= 2 * _MULTIPLE:
        yield replace(group, multiple=_MULTIPLE)
    if group.attributes:
        yield replace(group, attributes=())
    for attribute in group.attributes[1:] and group.attributes:
        yield replace(group, attributes=(attribute,))


def _problem(model: nn.Module, dummy_input: Any, groups: Sequence[DimensionGroup]) -> str | None:
    """Cut some units of groups for trial; return what goes wrong."""
    if not groups:
        return None
    kept = {g.name: _trial(g) for g in groups}
    comparable = all(group.exact for group in groups)
    modules = all_modules(model)
    snapshot = Snapshot(modules)
    try:
        silence(model, groups, kept)
        expected = _outputs(model, dummy_input)
        keep(model, groups, kept)
        found = _outputs(model, dummy_input)
    except Exception as error:
        return f"cut for trial, it does not run: {type(error).__name__}: {_short(error)}"
    finally:
        snapshot.roll_back()
    if [t.shape for t in expected] != [t.shape for t in found]:
        return "cut for trial, the network's outputs have other shapes"
    if comparable and not _close(expected, found):
        return "cut for trial, the network does not compute what it did without these units"
    return None


def _trial(group: DimensionGroup) -> list[int]:
    """Return units that stay in a trial: about two thirds, an odd number, scattered."""
    count = max(group.minimum, (2 * group.size) // 3)
    count -= (count + 1) % 2 if count > group.minimum else 0
    if group.multiple > 1:
        count = max(group.multiple, count // group.multiple * group.multiple)
    generator = torch.Generator().manual_seed(group.size)
    order = torch.randperm(group.size, generator=generator)[: max(1, count)]
    return sorted(order.tolist())


def _outputs(model: nn.Module, dummy_input: Any) -> list[torch.Tensor]:
    output = _plain(call_model(model, dummy_input))
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _close(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> bool:
    for a, b in zip(expected, found, strict=True):
        scale = float(a.float().abs().max()) or 1.0
        if not float((a.float() - b.float()).abs().max()) <= _TOLERANCE * scale:
            return False
    return True


def _short(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if len(text) <= 120 else text[:117] + "..."
