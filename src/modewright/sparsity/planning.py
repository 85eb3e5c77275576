# SPDX-License-Identifier: Apache-2.0
"""Rules + model -> which layer gets which pattern of zeros, and what is skipped for what reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modewright.errors import MatchError
from modewright.layers.matrices import matrix_parameters, multiplies_rows, to_matrix
from modewright.layers.roles import is_offloaded, is_router, shared_parameters
from modewright.matching import Matches, match_modules, require_matches
from modewright.sparsity.config import DEFAULT_SPARSITY, SparseConfig
from modewright.sparsity.pattern import Pattern, parse_pattern

SUPPORTED = "linear layers, convolutions, fused experts and the projections of MultiheadAttention"
ROUTER = "it picks or weighs experts; a pattern that names it would make it sparse"
SHARED = "its weight is shared with another layer"
NO_ROWS = (
    "its inputs cannot be seen as the rows of one matrix; mode 'sparse_magnitude' needs no inputs"
)


@dataclass(frozen=True)
class LayerSparsity:
    """What one layer gets.

    Attributes:
        names: Its parameters that get masks.
        pattern: Where zeros may lie.
        sparsity: The part of zeros.
    """

    names: tuple[str, ...]
    pattern: Pattern
    sparsity: float


@dataclass
class SparsePlan:
    """What a mode does to a model.

    Attributes:
        layers: What every layer that becomes sparse gets, by path.
        skipped: The reason for every layer that was matched and stays dense.
        unmatched: Patterns that matched nothing that can be sparse, where the config allows it.
    """

    layers: dict[str, LayerSparsity] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the plan for people."""
        groups: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(f"{layer.pattern}, {layer.sparsity:.0%} zeros", []).append(name)
        lines = [f"{len(names)} layers: {text} ({names[0]} ...)" for text, names in groups.items()]
        lines += [f"skips {name}: {reason}" for name, reason in self.skipped.items()]
        return lines + [f"pattern {p!r} matches nothing to make sparse" for p in self.unmatched]


def plan_layers(
    model: nn.Module, config: SparseConfig, *, mode: str, needs_rows: bool = False
) -> SparsePlan:
    """Find what every layer of a model gets.

    Args:
        model: The model.
        config: The mode's config.
        mode: Its name, for messages.
        needs_rows: Whether the mode has to see the rows that a weight multiplies.

    Raises:
        MatchError: A pattern matches nothing, or nothing that can be sparse.
    """
    modules = dict(model.named_modules())
    matching = _Matching(modules, config, mode)
    default = DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
    wanted: dict[str, tuple[str, float]] = {}
    for name in matching.targets(config.targets, "targets"):
        wanted[name] = config.pattern, default
    for number, rule in enumerate(config.rules):
        where = f"rules[{number}].targets"
        for name in matching.targets(rule.targets, where, rule.ignore):
            pattern, sparsity = wanted.get(name, (config.pattern, default))
            wanted[name] = (
                rule.pattern or pattern,
                sparsity if rule.sparsity is None else rule.sparsity,
            )
    for name in matching.names(config.ignore, "ignore"):
        wanted.pop(name, None)
    plan = SparsePlan(unmatched=matching.unmatched)
    shared = {name for places in shared_parameters(modules) for name, _ in places}
    for name, (text, sparsity) in wanted.items():
        layer = _layer_sparsity(modules[name], text, sparsity)
        reason = _why_not(modules[name], layer, needs_rows)
        if name not in matching.named and is_router(name, modules):
            reason = ROUTER
        elif name in shared:
            reason = SHARED
        if reason is not None:
            plan.skipped[name] = reason
        elif layer.sparsity:
            plan.layers[name] = layer
    if not plan.layers and config.on_unmatched == "error":
        reasons = "".join(f"\n  {n or 'the model'}: {why}" for n, why in plan.skipped.items())
        raise MatchError(
            f"mode {mode!r} would make nothing sparse: of {len(modules) - 1} modules none is "
            f"picked by the rules and one of {SUPPORTED}.{reasons}"
        )
    return plan


class _Matching:
    """Matches patterns, and remembers or refuses those that match nothing.

    Attributes:
        unmatched: The patterns that matched nothing.
        named: The paths that a target names, not only their class or with a wildcard at the end.
    """

    def __init__(self, modules: dict[str, nn.Module], config: SparseConfig, mode: str) -> None:
        self._modules, self._mode = modules, mode
        self._strict = config.on_unmatched == "error"
        self._able = [name for name, module in modules.items() if matrix_parameters(module)]
        self.unmatched: tuple[str, ...] = ()
        self.named: set[str] = set()

    def names(self, patterns: tuple[str, ...], where: str) -> frozenset[str]:
        """Return the paths of all modules that a pattern matches."""
        return self._matches(patterns, where).names

    def targets(
        self, patterns: tuple[str, ...] | None, where: str, ignore: tuple[str, ...] = ()
    ) -> list[str]:
        """Return the paths of layers that can be sparse, in the order of the model."""
        if patterns is None:
            found = frozenset(self._able)
        else:
            matches = self._matches(patterns, where)
            for pattern, names in matches.by_pattern.items():
                if names and not set(names) & set(self._able):
                    self._refuse(pattern, names, where)
                self.named |= {n for n in names if n.rpartition(".")[2] in pattern}
            found = matches.names
        found -= self.names(ignore, where.replace("targets", "ignore"))
        return [name for name in self._able if name in found]

    def _matches(self, patterns: tuple[str, ...], where: str) -> Matches:
        if self._strict:
            return require_matches(self._modules, patterns, f"`{where}` of mode {self._mode!r}")
        matches = match_modules(self._modules, patterns)
        self.unmatched += matches.unmatched
        return matches

    def _refuse(self, pattern: str, names: tuple[str, ...], where: str) -> None:
        if not self._strict:
            self.unmatched += (pattern,)
            return
        kinds = ", ".join(sorted({type(self._modules[n]).__name__ for n in names}))
        raise MatchError(
            f"`{where}` of mode {self._mode!r}: {pattern!r} matches only {kinds}, which cannot be "
            f"sparse. Supported: {SUPPORTED}. To reach the layers inside a container, end the "
            "pattern with '.*'."
        )


def _layer_sparsity(module: nn.Module, text: str, sparsity: float) -> LayerSparsity:
    pattern = parse_pattern(text)
    if pattern.fixed_sparsity is not None and sparsity:
        sparsity = pattern.fixed_sparsity
    return LayerSparsity(matrix_parameters(module), pattern, sparsity)


def _why_not(module: nn.Module, layer: LayerSparsity, needs_rows: bool) -> str | None:
    """Return why a layer stays dense."""
    if is_offloaded(module):
        return "its weight is offloaded by accelerate: load the model without offloading"
    for name in layer.names:
        parameter = module._parameters.get(name)
        if parameter is None or is_lazy(parameter):
            return "its weight is no parameter yet, or is computed from others"
        if not parameter.is_floating_point():
            return "its weight is not a floating-point tensor"
        inputs = to_matrix(module, name, torch.empty_like(parameter, device="meta")).shape[1]
        if layer.pattern.of and inputs % layer.pattern.of:
            return f"its {inputs} inputs are no multiple of {layer.pattern.of}"
    return NO_ROWS if needs_rows and not multiplies_rows(module) else None
