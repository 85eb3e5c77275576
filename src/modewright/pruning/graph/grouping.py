# SPDX-License-Identifier: Apache-2.0
"""From atoms to groups: components that lie in the same places are the units of one dimension."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from modewright.pruning.graph.atoms import Components, Ids, is_live
from modewright.pruning.graph.groups import Attribute, DimensionGroup, Kind, Slice
from modewright.pruning.graph.tracer import Tracer

_Place = tuple[str, int]
_Units = dict[int, dict[_Place, list[int]]]


def build_groups(trace: Tracer) -> tuple[list[DimensionGroup], dict[str, str]]:
    """Return the groups of a finished trace, and why other dimensions are left alone."""
    components = trace.atoms.solve()
    units = _units(trace, components)
    by_signature: dict[tuple[tuple[_Place, int], ...], list[int]] = defaultdict(list)
    for label, places in units.items():
        signature = tuple((place, len(found)) for place, found in places.items())
        by_signature[signature].append(label)
    builder = _Builder(trace, components, units)
    groups = []
    for labels in by_signature.values():
        group = builder.group(labels)
        if group is not None:
            groups.append(group)
    groups = _distinctly_named(groups)
    return groups, _left_alone(trace, components, groups)


def _units(trace: Tracer, components: Components) -> _Units:
    """Return for every component that may go the indices that it has in each place."""
    units: _Units = {}
    frozen = components.frozen
    for path, dims in trace.owned.items():
        if path not in trace.reached:
            continue
        for axis, dim in enumerate(dims):
            if not is_live(dim):
                continue
            for index, label in enumerate(components.labels[dim].tolist()):
                if label not in frozen:
                    places = units.setdefault(label, {})
                    places.setdefault((path, axis), []).append(index)
    return units


class _Builder:
    """Makes groups out of components."""

    def __init__(self, trace: Tracer, components: Components, units: _Units) -> None:
        self._trace, self._components, self._units = trace, components, units
        self._types = {path: type(module) for path, module in trace.model.named_modules()}
        self._numbers = [
            (module, name, components.labels[dim])
            for (module, name), dims in trace.numbers.items()
            for dim in dims
        ]
        self._lists = {path: components.labels[dim] for path, dim in trace.lists.items()}
        self._minimum = {
            int(components.labels[atom]): count for atom, count in trace.minimum.items()
        }

    def group(self, labels: list[int]) -> DimensionGroup | None:
        """Return the group of these units; none if nothing takes the dimension in."""
        slices = tuple(self._slice(place, labels) for place in self._units[labels[0]])
        experts = self._marked("experts", labels)
        if len(labels) < 2 or not (experts or any(s.role == "in" for s in slices)):
            return None
        makers = [s for s in slices if s.role == "out" or self._is(s, nn.Embedding)]
        kind = self._kind(labels, slices)
        minimum = max([1, *(self._minimum.get(label, 1) for label in labels)])
        return DimensionGroup(
            name=(makers or slices)[0].module or (makers or slices)[0].tensor,
            kind=kind,
            size=len(labels),
            slices=slices,
            attributes=self._attributes(labels),
            modules=tuple(p for p, found in self._lists.items() if set(labels) == set(found)),
            exact=not self._marked("mixed", labels),
            minimum=minimum,
        )

    def _slice(self, place: _Place, labels: list[int]) -> Slice:
        path, axis = place
        indices = torch.tensor([self._units[label][place] for label in labels])
        atoms = self._trace.owned[path][axis]
        consumed = bool(self._components.consumed[atoms[indices.reshape(-1).numpy()]].any())
        return Slice(path, axis, "in" if consumed else "out", indices)

    def _marked(self, mark: str, labels: list[int]) -> bool:
        marked = self._components.marked.get(mark, frozenset())
        return any(label in marked for label in labels)

    def _kind(self, labels: list[int], slices: tuple[Slice, ...]) -> Kind:
        if self._marked("experts", labels):
            return "experts"
        if self._marked("heads", labels):
            return "heads"
        normed = self._marked("mixed", labels)
        for found in slices:
            layer = self._trace.model.get_submodule(found.module)
            if found.axis > 1 or not isinstance(layer, nn.modules.conv._ConvNd):
                continue
            if found.role == "in" or layer.groups > 1 or not normed:
                return "channels"
        return "hidden" if normed else "ffn"

    def _is(self, found: Slice, kind: type) -> bool:
        return issubclass(self._types[found.module], kind)

    def _attributes(self, labels: list[int]) -> tuple[Attribute, ...]:
        """Return the numbers of modules that count these units."""
        wanted = set(labels)
        found: dict[tuple[str, str], int] = {}
        for module, name, dim in self._numbers:
            counts = Counter(label for label in dim.tolist() if label in wanted)
            if len(counts) == len(labels) and len(set(counts.values())) == 1:
                found.setdefault((module, name), next(iter(counts.values())))
        return tuple(Attribute(module, name, n) for (module, name), n in found.items())


def _distinctly_named(groups: list[DimensionGroup]) -> list[DimensionGroup]:
    counts = Counter(group.name for group in groups)
    seen: Counter[str] = Counter()
    result = []
    for group in groups:
        name = group.name
        if counts[name] > 1:
            seen[name] += 1
            name = f"{name}#{seen[group.name]}"
        result.append(replace(group, name=name))
    return result


def _left_alone(
    trace: Tracer, components: Components, groups: list[DimensionGroup]
) -> dict[str, str]:
    """Return for every module whose output dimension is in no group why it is not."""
    grouped = {(s.tensor, s.axis) for group in groups for s in group.slices}
    parameters = {path for path, _ in trace.model.named_parameters()}
    types = {path: type(module) for path, module in trace.model.named_modules()}
    alone: dict[str, str] = {}
    for path, dims in trace.owned.items():
        module = path.rpartition(".")[0]
        if path not in parameters or len(dims) < 2 or module in alone:
            continue
        if path not in trace.reached:
            alone[module] = "the example input does not reach it"
            continue
        filters = issubclass(types[module], nn.modules.conv._ConvNd)
        made = {
            axis: dim
            for axis, dim in enumerate(dims[:2] if filters else dims)
            if is_live(dim) and not components.consumed[dim].all()
        }
        table = issubclass(types[module], nn.Embedding)
        asked = range(len(dims)) if table else made
        if made and not any((path, axis) in grouped for axis in asked):
            alone[module] = _reason(made[max(made)], components)
    return alone


def _reason(dim: Ids, components: Components) -> str:
    for label in np.unique(components.labels[dim]).tolist():
        if label in components.frozen:
            return components.frozen[label]
    return "nothing in the network takes its output in"
