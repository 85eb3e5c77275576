# SPDX-License-Identifier: Apache-2.0
"""Rules + model -> which layer gets which scheme, and what is skipped for what reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pydantic import ValidationError
from torch import nn
from torch.nn.parameter import is_lazy

from modewright.errors import ConfigError, MatchError
from modewright.matching import Matches, match_modules, require_matches
from modewright.modes.config import describe_validation
from modewright.quantization.config import (
    QuantizeConfig,
    QuantizerOverride,
    Rule,
    SchemeConfig,
)
from modewright.quantization.layers import (
    DEFAULT_TARGETS,
    QUANTIZED_CLASSES,
    READS_CHILDREN,
    fitted_scheme,
    overrides_forward,
    supported_base,
)
from modewright.quantization.schemes import scheme


class SkipReason(str, Enum):
    """Why a layer that a pattern matched is not quantized; the value is what the user reads."""

    OWN_FORWARD = "its class overrides forward, which would bypass the quantizers"
    READ_BY_PARENT = "its parent reads its weight without calling it"
    SHARED_WEIGHT = "its weight is shared with a layer that is not quantized in the same way"
    NOT_FLOATING = "its weight is not a floating-point tensor"
    NO_PARAMETER = "its weight is no parameter yet, or is computed from others"


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
            f"mode 'quantize' would quantize nothing: of {len(modules) - 1} modules none is a "
            f"{', '.join(cls.__name__ for cls in QUANTIZED_CLASSES)} that the rules pick."
        )
    plan = LayerPlan(unmatched=matched.unmatched)
    skipped = _skips(modules, wanted)
    plan.skipped = skipped
    plan.schemes = {name: layer for name, layer in wanted.items() if name not in skipped}
    return plan


class _Matching:
    """Matches patterns, and remembers or refuses those that match nothing."""

    def __init__(self, modules: dict[str, nn.Module], config: QuantizeConfig) -> None:
        self._modules = modules
        self._strict = config.on_unmatched == "error"
        self.unmatched: tuple[str, ...] = ()

    def names(self, patterns: tuple[str, ...], where: str) -> frozenset[str]:
        """Return the paths of all modules that a pattern matches."""
        return self._matches(patterns, where).names

    def targets(
        self, patterns: tuple[str, ...] | None, where: str, ignore: tuple[str, ...] = ()
    ) -> list[str]:
        """Return the paths of layers that can be quantized, in the order of the model."""
        if patterns is None:  # here a model that is one layer counts too; patterns name parts
            found = match_modules(self._modules, DEFAULT_TARGETS).names | self._root_layer()
        else:
            matches = self._matches(patterns, where)
            for pattern, names in matches.by_pattern.items():
                if names and not any(supported_base(self._modules[n]) for n in names):
                    self._refuse(pattern, names, where)
            found = matches.names
        found -= self.names(ignore, where.replace("targets", "ignore"))
        return [n for n, m in self._modules.items() if n in found and supported_base(m)]

    def _root_layer(self) -> frozenset[str]:
        is_target = type(self._modules[""]).__name__ in DEFAULT_TARGETS
        return frozenset({""}) if is_target else frozenset()

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
            "cannot be quantized. Supported: "
            f"{', '.join(cls.__name__ for cls in QUANTIZED_CLASSES)}. To reach the layers "
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


def _skips(modules: dict[str, nn.Module], wanted: dict[str, SchemeConfig]) -> dict[str, SkipReason]:
    skipped: dict[str, SkipReason] = {}
    for name in wanted:
        module, parent = modules[name], modules[name.rpartition(".")[0]]
        base = supported_base(module)
        if base is None or overrides_forward(module, base):
            skipped[name] = SkipReason.OWN_FORWARD
        elif isinstance(parent, READS_CHILDREN):
            skipped[name] = SkipReason.READ_BY_PARENT
        else:
            weight = module._parameters.get("weight")
            if weight is None or is_lazy(weight):
                skipped[name] = SkipReason.NO_PARAMETER
            elif not weight.is_floating_point():
                skipped[name] = SkipReason.NOT_FLOATING
    for places in _sharing(modules):
        layers = [wanted.get(n) if k == "weight" and n not in skipped else None for n, k in places]
        weights = [layer and layer.weights for layer in layers]
        if any(w != weights[0] for w in weights):
            for name, key in places:
                if key == "weight" and name in wanted:
                    skipped.setdefault(name, SkipReason.SHARED_WEIGHT)
    return skipped


def _sharing(modules: dict[str, nn.Module]) -> list[list[tuple[str, str]]]:
    """Return for every parameter that is held more than once its holders: module and key."""
    holders: dict[int, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, key))
    return [places for places in holders.values() if len(places) > 1]


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
