# SPDX-License-Identifier: Apache-2.0
"""``SearchSpace``: a network of which any subnet can be run, while it keeps all its weights.

While the space is open, the root module has a class derived from its own. Its ``forward`` runs the
chosen subnet: every tensor is replaced by the part that stays, for the time of the call, and put
back. Gradients flow to the whole tensors, so that subnets which share weights can be trained.
Nothing chosen, the network is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from modewright.pruning.graph.groups import DimensionGroup
from modewright.pruning.surgery import CutPlan, Kept, cut, plan_cut, replace_tensors, sliced

_SPACE = "_search_space"


@dataclass(frozen=True)
class SearchSpace:
    """What is chosen of a network whose search space is open.

    Attributes:
        kept: By group name the units that stay; empty: all.
        plan: What that means for its tensors.
        untraced: By module path why it is left alone, once the network was traced.
    """

    kept: dict[str, list[int]] = field(default_factory=dict)
    plan: CutPlan = field(default_factory=CutPlan)
    untraced: dict[str, str] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Return the choice as JSON values and tensors."""
        return {"kept": self.kept, "plan": self.plan.to_data(), "untraced": self.untraced}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> SearchSpace:
        """Read what :meth:`to_data` wrote."""
        return cls(dict(data["kept"]), CutPlan.from_data(data["plan"]), dict(data["untraced"]))


class Elastic(nn.Module):
    """Base of the classes of networks whose search space is open."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chosen subnet."""
        with running_subnet(self, chosen(self).plan):
            return super().forward(*args, **kwargs)


def open_space(model: nn.Module, space: SearchSpace | None = None) -> None:
    """Open the search space of a network, by changing the class of its root."""
    if not isinstance(model, Elastic):
        model.__class__ = _elastic(type(model))  # type: ignore[arg-type]
    _set(model, space or SearchSpace())


def close_space(model: nn.Module) -> SearchSpace:
    """Make a network plain again, with all its weights; return what was chosen."""
    space = chosen(model)
    model.__class__ = type(model).__mro__[2]
    del model.__dict__[_SPACE]
    return space


def chosen(model: nn.Module) -> SearchSpace:
    """Return what is chosen of a network whose space is open."""
    return cast(SearchSpace, model.__dict__[_SPACE])


def is_elastic(model: nn.Module) -> bool:
    """Whether the search space of a network is open."""
    return isinstance(model, Elastic)


def choose(
    model: nn.Module,
    groups: Sequence[DimensionGroup],
    kept: Kept,
    untraced: dict[str, str] | None = None,
) -> None:
    """Choose a subnet: from now on the network runs it.

    Raises:
        ConfigError: The units are not units of the groups.
    """
    units = {name: [int(unit) for unit in found] for name, found in kept.items()}
    left = chosen(model).untraced if untraced is None else untraced
    _set(model, SearchSpace(units, plan_cut(model, groups, units), left))


def _set(model: nn.Module, space: SearchSpace) -> None:
    model.__dict__[_SPACE] = space  # another object each time, so that a roll-back finds the old


@cache
def _elastic(cls: type[nn.Module]) -> type[nn.Module]:
    made = type(cls.__name__, (Elastic, cls), {"__module__": cls.__module__})
    made.__qualname__ = cls.__qualname__
    return made


@contextmanager
def running_subnet(model: nn.Module, plan: CutPlan) -> Iterator[None]:
    """Let a network be a subnet of itself for a while; gradients flow to the whole tensors.

    Statistics of norms that are gathered meanwhile are written back to where they belong.
    """
    if not plan:
        yield
        return
    named = dict([*model.named_parameters(), *model.named_buffers()])
    new = {id(named[path]): sliced(named[path], axes) for path, axes in plan.kept.items()}
    modules = list(model.modules())
    snapshot = _Members(modules)
    try:
        replace_tensors(model, new)
        cut(model, CutPlan({}, plan.numbers, plan.lists))
        yield
    finally:
        snapshot.put_back()
        _write_back(model, plan, named, new)


def _write_back(
    model: nn.Module,
    plan: CutPlan,
    named: dict[str, torch.Tensor],
    new: dict[int, torch.Tensor],
) -> None:
    """Bring home what was written into parts of buffers."""
    for path, _ in model.named_buffers():
        if path not in plan.kept:
            continue
        part = new[id(named[path])]
        if torch.equal(part, sliced(named[path], plan.kept[path])):
            continue
        places = torch.meshgrid(
            *(
                plan.kept[path].get(axis, torch.arange(size)).to(part.device)
                for axis, size in enumerate(named[path].shape)
            ),
            indexing="ij",
        )
        with torch.no_grad():
            named[path][places] = part.detach()


class _Members:
    """Attributes of modules, to be put back; cheaper than a snapshot of tensors."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._attributes = [dict(vars(module)) for module in modules]
        self._members = [
            {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}
            for module in modules
        ]

    def put_back(self) -> None:
        """Put all attributes back that were there."""
        for module, attributes, members in zip(
            self._modules, self._attributes, self._members, strict=True
        ):
            for name, value in attributes.items():
                if name in members:
                    value.clear()
                    value.update(members[name])
                elif vars(module).get(name) is not value:
                    module.__dict__[name] = value
