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
from modewright.recipes.schema import Recipe, RecipeStep

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
        if (
            recipe.checks.max_loss_increase is not None
            or recipe.checks.max_kl_divergence is not None
        ):
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
        raise ConfigError(
            f"{place}: mode {step.mode!r} cannot be applied block by block: {why}. Supported when "
            f"streaming: {', '.join(STREAMED)}."
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
