# SPDX-License-Identifier: Apache-2.0
"""Rules + model -> which layer gets which scheme, and what is skipped for what reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pydantic import ValidationError
from torch import nn
from torch.nn.parameter import is_lazy

from modewright.errors import ConfigError, MatchError
from modewright.layers.roles import is_offloaded, is_router, shared_parameters
from modewright.matching import Matches, match_modules, require_matches
from modewright.modes.config import describe_validation
from modewright.quantization.config import (
    QuantizeConfig,
    QuantizerOverride,
    Rule,
    SchemeConfig,
)
from modewright.quantization.layers import (
    QuantizedLayer,
    fitted_scheme,
    layer_kind,
    supported_names,
)
from modewright.quantization.schemes import scheme


class SkipReason(str, Enum):
    """Why a layer that a pattern matched is not quantized; the value is what the user reads."""

    ROUTER = "it picks or weighs experts; a pattern that names it would quantize it"
    SHARED_WEIGHT = "its weight is shared with a layer that is not quantized in the same way"
    NOT_FLOATING = "its weight is not a floating-point tensor"
    NO_PARAMETER = "its weight is no parameter yet, or is computed from others"
    OFFLOADED = "its weight is offloaded by accelerate: load the model without offloading"


@dataclass
class LayerPlan:
    """What ``quantize`` does to a model.

    Attributes:
        schemes: The scheme of every layer that is quantized, by path.
        skipped: The reason for every layer that was matched and is not.
        unmatched: Patterns that matched nothing that can be quantized, where the config allows it.
    """

    schemes: dict[str, SchemeConfig] = field(default_factory=dict)
    skipped: dict[str, SkipReason] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the plan for people."""
        groups: dict[str, list[str]] = {}
        for name, layer in self.schemes.items():
            groups.setdefault(describe_scheme(layer), []).append(name)
        lines = [
            f"{len(names)} layer{'s' * (len(names) > 1)}: {text} ({_some(names)})"
            for text, names in groups.items()
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason.value, []).append(name)
        lines += [f"skips {_some(names)}: {reason}" for reason, names in by_reason.items()]
        lines += [f"pattern {pattern!r} matches nothing to quantize" for pattern in self.unmatched]
        return lines


def plan_layers(model: nn.Module, config: QuantizeConfig) -> LayerPlan:
    """Find the scheme of every layer of a model.

    Raises:
        MatchError: A pattern matches nothing, or nothing that can be quantized.
        ConfigError: A scheme is unknown, or a rule makes a quantizer that contradicts itself.
    """
    modules = dict(model.named_modules())
    matched = _Matching(modules, config)
    base_scheme = scheme(config.scheme)
    chosen: dict[str, SchemeConfig | None] = {}
    for name in matched.targets(config.targets, "targets"):
        chosen[name] = base_scheme
    for number, rule in enumerate(config.rules, start=1):
        where = f"rules[{number - 1}]"
        for name in matched.targets(rule.targets, f"{where}.targets", rule.ignore):
            chosen[name] = _changed(chosen.get(name), rule, where)
    ignored = matched.names(config.ignore, "ignore")
    fitted = {
        name: fitted_scheme(modules[name], layer)
        for name, layer in chosen.items()
        if layer is not None and name not in ignored
    }
    wanted = {name: layer for name, layer in fitted.items() if layer != SchemeConfig()}
    if not wanted and not config.on_unmatched == "report":
        raise MatchError(
            f"mode 'quantize' would quantize nothing: of {len(modules) - 1} modules none is "
            f"picked by the rules and one of {supported_names()}."
        )
    plan = LayerPlan(unmatched=matched.unmatched)
    skipped = _skips(modules, wanted, matched.named)
    plan.skipped = skipped
    plan.schemes = {name: layer for name, layer in wanted.items() if name not in skipped}
    return plan


class _Matching:
    """Matches patterns, and remembers or refuses those that match nothing.

    Attributes:
        unmatched: The patterns that matched nothing.
        named: The paths that a target names, not only their class or with a wildcard at the end.
    """

    def __init__(self, modules: dict[str, nn.Module], config: QuantizeConfig) -> None:
        self._modules = modules
        self._strict = config.on_unmatched == "error"
        asks_for_kv = _asks_for_kv(config)
        self._kinds: dict[str, type[QuantizedLayer]] = {}
        for name, module in modules.items():
            kind = layer_kind(module)
            if kind is not None and (asks_for_kv or kind.parameter_names(module)):
                self._kinds[name] = kind
        self.unmatched: tuple[str, ...] = ()
        self.named: set[str] = set()

    def names(self, patterns: tuple[str, ...], where: str) -> frozenset[str]:
        """Return the paths of all modules that a pattern matches."""
        return self._matches(patterns, where).names

    def targets(
        self, patterns: tuple[str, ...] | None, where: str, ignore: tuple[str, ...] = ()
    ) -> list[str]:
        """Return the paths of layers that can be quantized, in the order of the model."""
        if patterns is None:  # here a model that is one layer counts too; patterns name parts
            found = frozenset(name for name, kind in self._kinds.items() if kind.by_default)
        else:
            matches = self._matches(patterns, where)
            for pattern, names in matches.by_pattern.items():
                if names and not any(name in self._kinds for name in names):
                    self._refuse(pattern, names, where)
                self.named |= {n for n in names if n.rpartition(".")[2] in pattern}
            found = matches.names
        found -= self.names(ignore, where.replace("targets", "ignore"))
        return [name for name in self._kinds if name in found]

    def _matches(self, patterns: tuple[str, ...], where: str) -> Matches:
        if self._strict:
            return require_matches(self._modules, patterns, f"`{where}` of mode 'quantize'")
        matches = match_modules(self._modules, patterns)
        self.unmatched += matches.unmatched
        return matches

    def _refuse(self, pattern: str, names: tuple[str, ...], where: str) -> None:
        if not self._strict:
            self.unmatched += (pattern,)
            return
        kinds = sorted({type(self._modules[n]).__name__ for n in names})
        raise MatchError(
            f"`{where}` of mode 'quantize': {pattern!r} matches only {', '.join(kinds)}, which "
            f"cannot be quantized. Supported: {supported_names()}. To reach the layers "
            "inside a container, end the pattern with '.*'."
        )


def _changed(current: SchemeConfig | None, rule: Rule, where: str) -> SchemeConfig | None:
    base = current if rule.scheme is None else scheme(rule.scheme)
    members = dict(base or SchemeConfig())
    try:
        for member in members:
            override: QuantizerOverride | None = getattr(rule, member)
            if override is not None:
                members[member] = override.on(members[member])
        return SchemeConfig(**members)
    except ValidationError as error:
        raise ConfigError(
            f"`{where}` of mode 'quantize' does not fit the scheme that it changes:\n"
            f"{describe_validation(error)}"
        ) from error


def _asks_for_kv(config: QuantizeConfig) -> bool:
    """Whether keys and values of attention are to be quantized anywhere."""
    names = [config.scheme, *(rule.scheme for rule in config.rules if rule.scheme is not None)]
    schemes = [scheme(name) for name in names]
    return any(s is not None and s.kv_cache is not None for s in schemes) or any(
        rule.kv_cache is not None for rule in config.rules
    )


def _skips(
    modules: dict[str, nn.Module], wanted: dict[str, SchemeConfig], named: set[str]
) -> dict[str, SkipReason]:
    quantized = {name: _parameter_names(modules[name]) for name in wanted}
    skipped: dict[str, SkipReason] = {}
    for name in wanted:
        reason = _reason(modules[name], quantized[name])
        if name not in named and is_router(name, modules):
            reason = SkipReason.ROUTER
        if reason is not None:
            skipped[name] = reason
    for places in shared_parameters(modules):
        layers = [
            wanted.get(n) if k in quantized.get(n, ()) and n not in skipped else None
            for n, k in places
        ]
        weights = [layer and layer.weights for layer in layers]
        if any(w != weights[0] for w in weights):
            for name, key in places:
                if key in quantized.get(name, ()):
                    skipped.setdefault(name, SkipReason.SHARED_WEIGHT)
    return skipped


def _parameter_names(module: nn.Module) -> tuple[str, ...]:
    kind = layer_kind(module)
    return () if kind is None else kind.parameter_names(module)


def _reason(module: nn.Module, names: tuple[str, ...]) -> SkipReason | None:
    """Return why the parameters of one layer cannot be quantized."""
    if names and is_offloaded(module):
        return SkipReason.OFFLOADED
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None or is_lazy(parameter):
            return SkipReason.NO_PARAMETER
        if not parameter.is_floating_point():
            return SkipReason.NOT_FLOATING
    return None


def describe_scheme(layer: SchemeConfig) -> str:
    """Return a scheme in words: ``int4 weights in groups of 64, int8 inputs per token``."""
    parts = []
    for label, member in (
        ("weights", layer.weights),
        ("inputs", layer.input_activations),
        ("outputs", layer.output_activations),
        ("keys and values", layer.kv_cache),
    ):
        if member is None:
            continue
        grain = f"per {member.granularity}"
        if member.group_size is not None:
            grain = f"in groups of {member.group_size}"
        if member.block_size is not None:
            grain = "in tiles of {} x {}".format(*member.block_size)
        kind = member.format_name
        parts.append(f"{kind} {label} {grain}{' (dynamic)' if member.dynamic else ''}")
    return ", ".join(parts) or "unchanged"


def _some(names: list[str], limit: int = 3) -> str:
    names = [name or "the model itself" for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
