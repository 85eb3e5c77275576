# SPDX-License-Identifier: Apache-2.0
"""modewright: make neural networks smaller and faster in recorded, restorable steps.

Everything public is here; names are imported when they are first used, so that
``import modewright`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modewright._version import __version__

if TYPE_CHECKING:
    from modewright import errors
    from modewright.api import (
        apply_mode,
        check_mode,
        inspect,
        is_converted,
        last_mode,
        mode_state,
        plan,
        quantize,
        remove_mode_state,
        restore,
        restore_from_mode_state,
        save,
        search,
        verify,
    )
    from modewright.builtin_modes import default_registry, register_mode
    from modewright.modes.config import ModeConfig
    from modewright.modes.descriptor import ModeDescriptor
    from modewright.modes.registry import ModeRegistry
    from modewright.modes.search import SearchResult
    from modewright.modes.searcher import BaseSearcher
    from modewright.modes.traits import Trait
    from modewright.recipes.loader import load_recipe
    from modewright.recipes.schema import Recipe
    from modewright.run.optimize import optimize
    from modewright.run.result import Result

_HOME = {
    "apply_mode": "api",
    "inspect": "api",
    "is_converted": "api",
    "last_mode": "api",
    "mode_state": "api",
    "plan": "api",
    "quantize": "api",
    "remove_mode_state": "api",
    "restore": "api",
    "restore_from_mode_state": "api",
    "save": "api",
    "search": "api",
    "verify": "api",
    "default_registry": "builtin_modes",
    "register_mode": "builtin_modes",
    "ModeConfig": "modes.config",
    "check_mode": "api",
    "ModeDescriptor": "modes.descriptor",
    "ModeRegistry": "modes.registry",
    "SearchResult": "modes.search",
    "BaseSearcher": "modes.searcher",
    "Trait": "modes.traits",
    "load_recipe": "recipes.loader",
    "Recipe": "recipes.schema",
    "Result": "run.result",
    "optimize": "run.optimize",
}

__all__ = [
    "BaseSearcher",
    "ModeConfig",
    "ModeDescriptor",
    "ModeRegistry",
    "Recipe",
    "Result",
    "SearchResult",
    "Trait",
    "__version__",
    "apply_mode",
    "check_mode",
    "default_registry",
    "errors",
    "inspect",
    "is_converted",
    "last_mode",
    "load_recipe",
    "mode_state",
    "optimize",
    "plan",
    "quantize",
    "register_mode",
    "remove_mode_state",
    "restore",
    "restore_from_mode_state",
    "save",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("modewright.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'modewright' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"modewright.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
