# SPDX-License-Identifier: Apache-2.0
"""The search space of ``auto_quantize`` on a model: who can get which scheme, and what was chosen.

It lies on the root module while the mode is the last one, and in the mode's record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from modewright.errors import SearchError
from modewright.mixed_precision.config import AutoQuantizeConfig
from modewright.quantization.config import QuantizeConfig
from modewright.quantization.convert import quantized_layers, restore_quantize
from modewright.quantization.layers import fitted_scheme, remove_quantizers
from modewright.quantization.layers.parents import read_parts
from modewright.quantization.planning import plan_layers
from modewright.quantization.representation import SchemeConfig
from modewright.quantization.schemes import NO_SCHEME, scheme

Metadata = dict[str, Any]
ATTRIBUTE = "_modewright_auto_quantize"


@dataclass
class Space:
    """What mode ``auto_quantize`` opened on a model.

    Attributes:
        candidates: Names of schemes.
        layers: Paths of the layers that are chosen for.
        skipped: What was matched and is left alone, ``{"module": path, "reason": text}``.
        table: What was scored, JSON; empty before a search.
        chosen: By layer the name of its scheme; empty before a search.
        outcome: What the choice was made for and what it costs, JSON.
    """

    candidates: tuple[str, ...]
    layers: tuple[str, ...]
    skipped: list[dict[str, str]]
    table: Metadata = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    outcome: Metadata = field(default_factory=dict)

    def schemes(self, model: nn.Module) -> dict[str, SchemeConfig]:
        """Return by layer the scheme that was chosen, fitted to it; without those left alone."""
        found = {}
        for path, name in self.chosen.items():
            wanted = scheme(name)
            if wanted is not None:
                found[path] = fitted_scheme(model.get_submodule(path), wanted)
        return found

    def rules(self) -> list[dict[str, Any]]:
        """Return the choice as rules of mode ``quantize``, which begins with scheme ``none``."""
        by_scheme: dict[str, list[str]] = {}
        for path, name in self.chosen.items():
            by_scheme.setdefault(name, []).append(path)
        return [
            {"targets": paths, "scheme": name}
            for name, paths in by_scheme.items()
            if name != NO_SCHEME
        ]

    def metadata(self, model: nn.Module) -> Metadata:
        """Return what the mode records."""
        return {
            "candidates": list(self.candidates),
            "targets": list(self.layers),
            "skipped": self.skipped,
            "table": self.table,
            "chosen": self.chosen,
            "outcome": self.outcome,
            "layers": {p: s.model_dump(mode="json") for p, s in self.schemes(model).items()},
        }


def open_space(model: nn.Module, config: AutoQuantizeConfig) -> Space:
    """Find the layers that can be quantized, and put the space on the model.

    Raises:
        MatchError: A pattern matches nothing, or nothing that can be quantized.
    """
    plan = plan_layers(model, quantize_config(config))
    skipped = [{"module": n, "reason": r.value} for n, r in plan.skipped.items()]
    space = Space(config.candidates, tuple(plan.schemes), skipped)
    model.__dict__[ATTRIBUTE] = space
    return space


def quantize_config(config: AutoQuantizeConfig) -> QuantizeConfig:
    """Return the config of mode ``quantize`` that picks the layers."""
    first = next(name for name in config.candidates if name != NO_SCHEME)
    return QuantizeConfig(scheme=first, targets=config.targets, ignore=config.ignore)


def space_of(model: nn.Module) -> Space:
    """Return the space that is open on a model.

    Raises:
        SearchError: None is.
    """
    space = model.__dict__.get(ATTRIBUTE)
    if not isinstance(space, Space):
        raise SearchError(
            "There is no search space of mode 'auto_quantize' on this model: apply the mode first."
        )
    return space


def put_in(model: nn.Module, space: Space) -> None:
    """Give every layer the quantizers that were chosen for it, instead of those that it has."""
    for layer in quantized_layers(model).values():
        remove_quantizers(layer)
    read_parts(model)
    layers = {p: s.model_dump(mode="json") for p, s in space.schemes(model).items()}
    restore_quantize(model, {"layers": layers})


def restore(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Put space and quantizers back as they were recorded."""
    restore_quantize(model, metadata)
    model.__dict__[ATTRIBUTE] = Space(
        candidates=tuple(metadata["candidates"]),
        layers=tuple(metadata["targets"]),
        skipped=cast("list[dict[str, str]]", metadata["skipped"]),
        table=metadata["table"],
        chosen=metadata["chosen"],
        outcome=metadata["outcome"],
    )
    return model
