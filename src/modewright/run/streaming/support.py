# SPDX-License-Identifier: Apache-2.0
"""Which recipes can be applied block by block, and which modes of them look at data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from modewright.errors import ConfigError
from modewright.modes.config import ModeConfig, build_config
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import ModeState
from modewright.quantization.config import MseConfig
from modewright.quantization.convert import quantized_layers, quantizers
from modewright.quantization.packing import why_not_packed
from modewright.recipes.loader import load_recipe, recipe_names
from modewright.recipes.schema import Recipe, RecipeStep
from modewright.run.streaming.units import Units

NeedsData = Callable[[ModeConfig, bool], bool]


def _never(config: ModeConfig, static: bool) -> bool:
    return False


def _if_static(config: ModeConfig, static: bool) -> bool:
    return static


def _mse(config: ModeConfig, static: bool) -> bool:
    return static or (isinstance(config, MseConfig) and config.importance)


def _always(config: ModeConfig, static: bool) -> bool:
    return True


# Modes that treat every layer or block by itself, and when they look at data: by config, and by
# whether activations have static scales.
STREAMED: Mapping[str, NeedsData] = {
    "quantize": _never,
    "max_calibrate": _if_static,
    "percentile": _if_static,
    "entropy": _if_static,
    "mse": _mse,
    "hqq": _if_static,
    "hadamard": _never,
    "smoothquant": _always,
    "awq": _always,
    "svdquant": _always,
    "bias_correction": _always,
    "gptq": _always,
    "learned_rounding": _always,
    "export_quantize": _never,
    "compress": _never,
}
_WHY_NOT = {
    "rotate": "it turns the stream that all blocks read and write",
    "auto_quantize": "it weighs all layers against one another",
    "lsq": "it learns the scales of all blocks together",
    **dict.fromkeys(
        ("sparse_magnitude", "wanda", "sparsegpt", "alps", "export_sparse"),
        "sparsity is not streamed yet",
    ),
    "decompress": "it begins with a packed model, which fits in memory",
}


class Steps:
    """The steps of a recipe, as they are applied to each unit of a model.

    Args:
        recipe: The recipe.
        registry: Where its modes are looked up.

    Raises:
        ConfigError: A step cannot be applied block by block.
    """

    def __init__(self, recipe: Recipe, registry: ModeRegistry) -> None:
        for index, step in enumerate(recipe.steps):
            _check(recipe, index, step)
        if any(limit is not None for _, limit in recipe.checks):
            raise ConfigError(
                f"{recipe.place('checks')}: streaming never holds the whole model, so it measures "
                "no quality and cannot check it. Leave `checks` out, and measure the result with "
                "`modewright bench` or where it runs."
            )
        self._configs = [
            build_config(registry[step.mode].config_class, step.config, where=f"mode {step.mode!r}")
            for step in recipe.steps
        ]
        self.modes = [step.mode for step in recipe.steps]

    @property
    def configs(self) -> list[dict[str, Any]]:
        """The configs as they are recorded."""
        return [config.to_json() for config in self._configs]

    def needing_data(self, quantized: nn.Module) -> list[str]:
        """Return the modes that look at data.

        Args:
            quantized: The model with its quantizers, with or without weights.
        """
        static = has_static_activations(quantized)
        pairs = zip(self.modes, self._configs, strict=True)
        return [mode for mode, config in pairs if STREAMED[mode](config, static)]

    def last_with_data(self, quantized: nn.Module) -> int:
        """Return the number of the last step that looks at data; -1 if none does."""
        static = has_static_activations(quantized)
        pairs = enumerate(zip(self.modes, self._configs, strict=True))
        return max((n for n, (mode, c) in pairs if STREAMED[mode](c, static)), default=-1)

    def check_units(self, units: Units, quantized: nn.Module) -> None:
        """Check that every unit can go through all steps.

        Args:
            units: The pieces of the model.
            quantized: The whole model with quantizers, without weights.

        Raises:
            ConfigError: One has quantized layers, and none of them can be packed.
        """
        if "compress" not in self.modes:
            return
        reasons: dict[str, dict[str, str | None]] = {}
        for path, layer in quantized_layers(quantized).items():
            why = why_not_packed(quantized, path, layer)
            reasons.setdefault(units.owner(path), {})[path] = why
        for unit, found in reasons.items():
            if all(found.values()):
                listed = "".join(f"\n  {path}: {why}" for path, why in list(found.items())[:4])
                raise ConfigError(
                    f"Mode 'compress' would pack nothing of {unit}, and each unit of a model that "
                    f"is streamed has to have something to pack:{listed}\nLeave these layers out "
                    "with `ignore`, or optimize without streaming."
                )

    def require_early_scales(self, quantized: nn.Module) -> None:
        """Check that what runs before the blocks has its scales when ranges are looked at.

        Raises:
            ConfigError: A step searches the scales of weights and looks at ranges of activations,
                and layers before the blocks are quantized.
        """
        searching = [mode for mode in self.modes if mode in ("mse", "hqq")]
        if searching and has_static_activations(quantized):
            raise ConfigError(
                f"mode {searching[0]!r} sets scales of weights and of static activations at once, "
                "and layers before the blocks are quantized too: when streaming, their scales "
                "would come too late. Leave them out (`ignore`), or take max_calibrate, "
                "percentile or entropy."
            )

    def for_shell(self) -> list[tuple[str, dict[str, Any]]]:
        """Return modes and configs for one unit, in which patterns may match nothing.

        Those of ``quantize`` are checked against the whole model beforehand.
        """
        return [
            (mode, {**config, **({"on_unmatched": "report"} if mode == "quantize" else {})})
            for mode, config in zip(self.modes, self.configs, strict=True)
        ]

    def as_recorded(self, state: ModeState) -> ModeState:
        """Return the log of one unit with the configs that the recipe gives."""
        pairs = zip(state.records, self.configs, strict=True)
        return ModeState(tuple(replace(record, config=config) for record, config in pairs))


def has_static_activations(quantized: nn.Module) -> bool:
    """Whether a quantizer of activations takes its scales from data."""
    of_parameters = {
        id(quantizer)
        for layer in quantized_layers(quantized).values()
        for quantizer in layer.quantized_parameters().values()
    }
    return any(
        id(quantizer) not in of_parameters and not quantizer.config.dynamic
        for quantizer in quantizers(quantized).values()
    )


def _check(recipe: Recipe, index: int, step: RecipeStep) -> None:
    place = recipe.place("steps", index)
    if step.mode not in STREAMED:
        why = _WHY_NOT.get(step.mode, "it is not known to treat every block by itself")
        instead = recipes_instead(recipe)
        named = f", or take recipe {' or '.join(map(repr, instead))}" if instead else ""
        raise ConfigError(
            f"{place}: mode {step.mode!r} cannot be applied block by block: {why}. Leave it out"
            f"{named}. Supported when streaming: {', '.join(STREAMED)}."
        )
    if index == 0 and step.mode != "quantize":
        raise ConfigError(
            f"{place}: the first mode of a recipe that is streamed must be 'quantize', which says "
            f"what of each block is converted; received {step.mode!r}."
        )
    if step.fallback:
        raise ConfigError(
            f"{place}: a fallback could be taken for some blocks and not for others. Leave "
            "`fallback` out when streaming."
        )
    given = [name for name in ("targets", "ignore") if step.config.get(name)]
    if given and step.mode != "quantize":
        raise ConfigError(
            f"{place}: {', '.join(given)} of mode {step.mode!r} cannot be matched block by block. "
            "Leave them out when streaming."
        )


def recipes_instead(recipe: Recipe) -> list[str]:
    """Return the names of library recipes with the same scheme that can be streamed."""
    scheme = _scheme(recipe)
    others = (load_recipe(name) for name in recipe_names())
    return [
        other.name
        for other in others
        if _scheme(other) == scheme is not None
        and all(step.mode in STREAMED for step in other.steps)
        and other.steps[0].mode == "quantize"
    ]


def _scheme(recipe: Recipe) -> object:
    """Return what the first ``quantize`` of a recipe names; ``None`` if there is none."""
    found = (step.config.get("scheme") for step in recipe.steps if step.mode == "quantize")
    return next(found, None)
