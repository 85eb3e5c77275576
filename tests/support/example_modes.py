# SPDX-License-Identifier: Apache-2.0
"""Example modes, written as third parties would write them.

``gain`` overrides every member with an ``@property``, the style of modes for other tools.
``widths`` opens a search space that a searcher explores and ``export_widths`` closes.
``random_mask`` draws numbers, writes in place, and can be restored from its metadata alone.
``scripted`` does what it is told, which is mostly harm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from modewright.modes.config import ModeConfig
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.registry import ModeRegistry
from modewright.modes.searcher import BaseSearcher
from modewright.modes.traits import Trait
from support.models import Block


class NoConfig(ModeConfig):
    """Nothing to set."""


# --- every member is a property ------------------------------------------------------------------


class GainConfig(ModeConfig):
    factor: float = Field(default=2.0, gt=0, description="What outputs are multiplied by.")


class GainLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def _put_gain(model: nn.Module, names: list[str], factor: float) -> nn.Module:
    for name in names:
        layer = model.get_submodule(name)
        layer.__class__ = GainLinear
        layer.register_buffer("gain", torch.tensor(factor))
    return model


def convert_gain(
    model: nn.Module, config: GainConfig, **_: object
) -> tuple[nn.Module, dict[str, Any]]:
    names = list(_linear_layers(model))
    return _put_gain(model, names, config.factor), {"layers": names, "new_modes": 0}


def restore_gain(model: nn.Module, config: GainConfig, metadata: dict[str, Any]) -> nn.Module:
    return _put_gain(model, metadata["layers"], config.factor)


def count_new_mode(model: nn.Module, config: GainConfig, metadata: dict[str, Any]) -> None:
    metadata["new_modes"] += 1


class GainMode(ModeDescriptor[GainConfig]):
    """Multiply the outputs of linear layers."""

    @property
    def name(self) -> str:
        return "gain"

    @property
    def config_class(self) -> type[GainConfig]:
        return GainConfig

    @property
    def next_modes(self) -> set[str] | None:
        return None

    @property
    def next_prohibited_modes(self) -> set[str] | None:
        return {"gain"}

    @property
    def export_mode(self) -> str | None:
        return None

    @property
    def is_export_mode(self) -> bool:
        return False

    @property
    def require_model_like(self) -> bool:
        return False

    @property
    def save_mode_in_state(self) -> bool:
        return True

    @property
    def convert(self) -> Callable[..., Any]:
        return convert_gain

    @property
    def restore(self) -> Callable[..., Any]:
        return restore_gain

    @property
    def update_for_new_mode(self) -> Callable[..., None]:
        return count_new_mode

    @property
    def update_for_save(self) -> Callable[..., None]:
        return lambda model, config, metadata: metadata.update(saved=True)


# --- a search space, its searcher, and the mode that closes it -----------------------------------


class WidthsConfig(ModeConfig):
    choices: tuple[int, ...] = Field(default=(4, 8, 12), description="Widths of hidden layers.")


class ElasticBlock(Block):
    """A block that uses the first ``width`` of its hidden units."""

    width: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.fc1(x))[..., : self.width]
        return x + F.linear(hidden, self.fc2.weight[:, : self.width], self.fc2.bias)


def elastic_blocks(model: nn.Module) -> dict[str, ElasticBlock]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ElasticBlock)}


class WidthSearcher(BaseSearcher):
    """Tries every combination of widths; the best one distorts the output least."""

    tried: int

    @property
    def default_search_config(self) -> dict[str, Any]:
        return {**super().default_search_config, "stop_after": None}

    @property
    def default_state_dict(self) -> dict[str, Any]:
        return {"tried": 0, "errors": torch.zeros(0)}

    def run_search(self) -> None:
        blocks = elastic_blocks(self.model)
        choices = [sorted({4, 8, block.fc1.out_features}) for block in blocks.values()]
        self.set_widths({name: block.fc1.out_features for name, block in blocks.items()})
        target = self.model(self.dummy_input)
        for number, widths in enumerate(itertools.product(*choices)):
            if number < self.tried:
                continue
            if number == self.config["stop_after"]:
                raise KeyboardInterrupt
            self._try(dict(zip(blocks, widths, strict=True)), target)
            self.tried = number + 1
            self.save_search_checkpoint()

    def _try(self, widths: dict[str, int], target: torch.Tensor) -> None:
        self.set_widths(widths)
        error = (self.model(self.dummy_input) - target).square().mean().detach()
        self.errors = torch.cat([self.errors, error.reshape(1)])
        fits = sum(widths.values()) <= self.constraints["width"]
        if fits and error.item() < self.best.get("error", float("inf")):
            self.best = {"widths": widths, "error": error.item()}

    def after_search(self) -> None:
        self.set_widths(self.best["widths"])

    def set_widths(self, widths: dict[str, int]) -> None:
        for name, width in widths.items():
            self.model.get_submodule(name).width = width


class WidthsMode(ModeDescriptor[WidthsConfig]):
    """Let blocks use a part of their hidden units."""

    name = "widths"
    technique = "examples"
    config_class = WidthsConfig
    export_mode = "export_widths"
    provides = frozenset({Trait.SEARCH_SPACE})
    forbids = frozenset({Trait.SEARCH_SPACE})
    search_algorithm = WidthSearcher
    writes_in_place = False

    def convert(self, model: nn.Module, config: WidthsConfig) -> tuple[nn.Module, dict[str, Any]]:
        for block in [m for m in model.modules() if type(m) is Block]:
            block.__class__ = ElasticBlock
            block.width = min(max(config.choices), block.fc1.out_features)
        return model, self._active(model)

    def restore(
        self, model: nn.Module, config: WidthsConfig, metadata: dict[str, Any]
    ) -> nn.Module:
        for name, width in metadata["widths"].items():
            block = model.get_submodule(name)
            block.__class__ = ElasticBlock
            block.width = width
        return model

    def update_for_new_mode(
        self, model: nn.Module, config: WidthsConfig, metadata: dict[str, Any]
    ) -> None:
        metadata.update(self._active(model))

    update_for_save = update_for_new_mode

    def _active(self, model: nn.Module) -> dict[str, Any]:
        return {"widths": {name: block.width for name, block in elastic_blocks(model).items()}}


class ExportWidthsMode(ModeDescriptor[NoConfig]):
    """Cut hidden units that are not used."""

    name = "export_widths"
    technique = "examples"
    config_class = NoConfig
    is_export_mode = True
    removes = frozenset({Trait.SEARCH_SPACE})
    provides = frozenset({Trait.PRUNED})
    writes_in_place = False

    def convert(self, model: nn.Module, config: NoConfig) -> tuple[nn.Module, dict[str, Any]]:
        widths = {name: block.width for name, block in elastic_blocks(model).items()}
        return self.restore(model, config, {"widths": widths}), {"widths": widths}

    def restore(self, model: nn.Module, config: NoConfig, metadata: dict[str, Any]) -> nn.Module:
        for name, width in metadata["widths"].items():
            block = model.get_submodule(name)
            block.fc1.weight = nn.Parameter(block.fc1.weight.detach()[:width].clone())
            block.fc1.bias = nn.Parameter(block.fc1.bias.detach()[:width].clone())
            block.fc2.weight = nn.Parameter(block.fc2.weight.detach()[:, :width].clone())
            block.fc1.out_features = block.fc2.in_features = width
            block.__class__ = Block
            del block.width
        return model


# --- random numbers, writes in place -------------------------------------------------------------


class RandomMaskConfig(ModeConfig):
    keep: float = Field(default=0.5, gt=0, le=1, description="The part of weights that is kept.")


class MaskedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class RandomMaskMode(ModeDescriptor[RandomMaskConfig]):
    """Keep a random part of the weights at zero."""

    name = "random_mask"
    technique = "examples"
    config_class = RandomMaskConfig
    provides = frozenset({Trait.SPARSE, "examples:random"})

    def convert(
        self, model: nn.Module, config: RandomMaskConfig
    ) -> tuple[nn.Module, dict[str, Any]]:
        masks = {
            name: torch.rand(layer.weight.shape) < config.keep
            for name, layer in _linear_layers(model).items()
        }
        return self.restore(model, config, {"masks": masks}), {"masks": masks}

    def restore(
        self, model: nn.Module, config: RandomMaskConfig, metadata: dict[str, Any]
    ) -> nn.Module:
        for name, mask in metadata["masks"].items():
            layer = model.get_submodule(name)
            layer.__class__ = MaskedLinear
            layer.register_buffer("mask", mask, persistent=False)
            with torch.no_grad():
                layer.weight.mul_(mask)
        return model


# --- modes made to measure -----------------------------------------------------------------------


class ScriptedMode(ModeDescriptor[NoConfig]):
    """Run what ``mode_kwargs`` bring."""

    name = "scripted"
    config_class = NoConfig

    def convert(
        self,
        model: nn.Module,
        config: NoConfig,
        *,
        script: Callable[[nn.Module], object] = lambda model: None,
        result: Any = None,
        error: BaseException | None = None,
    ) -> Any:
        script(model)
        if error is not None:
            raise error
        return (model, {}) if result is None else result(model)

    def restore(self, model: nn.Module, config: NoConfig, metadata: dict[str, Any]) -> nn.Module:
        return model


def make_mode(name: Any, /, **members: Any) -> ModeDescriptor[Any]:
    """A mode that changes nothing, with the members that are given."""
    defaults = {
        "name": name,
        "config_class": NoConfig,
        "convert": lambda self, model, config, **kwargs: (model, {}),
        "restore": lambda self, model, config, metadata: model,
        "__doc__": f"The mode {name}.",
    }
    return type(f"Mode_{name}", (ModeDescriptor,), {**defaults, **members})()


def example_registry() -> ModeRegistry:
    return ModeRegistry([GainMode, WidthsMode, ExportWidthsMode, RandomMaskMode, ScriptedMode])
