# SPDX-License-Identifier: Apache-2.0
"""How attention of Transformers models is given another function without changing its config.

Such attention picks the function that computes it by the name ``config._attn_implementation``, from
a table that is open to additions. A name is added there, and only the layers that are meant see it,
through a view of their config; the config itself, and what is saved of it, stay as they are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

TABLE = "ALL_ATTENTION_FUNCTIONS"


class _Routed(str):
    """The name of another function; it compares like the name of the one behind it too."""

    __slots__ = ("behind",)
    behind: object

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self.behind == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class ConfigView:
    """A config with another ``_attn_implementation``; everything else is the config's own.

    Args:
        config: The config.
        name: The name that is read instead.
    """

    def __init__(self, config: object, name: str) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "_config"), name)
        if name != "_attn_implementation":
            return value
        routed = _Routed(object.__getattribute__(self, "_name"))
        routed.behind = value
        return routed

    def __setattr__(self, name: str, value: object) -> None:
        setattr(object.__getattribute__(self, "_config"), name, value)


def implementation_of(config: object) -> object:
    """Return which attention a config of Transformers asks for, ``None`` if it is none.

    A config looks up whatever is read of it in several steps; this goes past them.
    """
    try:
        return object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        return getattr(config, "_attn_implementation", None)


def takes_function(module: nn.Module) -> bool:
    """Whether a layer takes the function that computes it from the table of Transformers."""
    return (
        TABLE in names_in_forward(type(module))  # type: ignore[arg-type]
        and hasattr(module.__dict__.get("config"), "_attn_implementation")
        and hasattr(sys.modules.get(type(module).__module__), TABLE)
    )


def register_function(cls: type[nn.Module], name: str, function: Callable[..., Any]) -> None:
    """Add a function to the table that layers of a class take theirs from."""
    type(_table_of(cls)).register(name, function)


def function_named(cls: type[nn.Module], name: object) -> Any:
    """Return the function that layers of a class take for a name."""
    return _table_of(cls).get_interface(name, _eager_function(cls))


@cache
def names_in_forward(cls: type[nn.Module]) -> tuple[str, ...]:
    """Return the names that the forward of a class uses, those of its arguments among them."""
    forward: Callable[..., Any] = inspect.unwrap(cls.forward)
    code = getattr(forward, "__code__", None)
    return code.co_names + code.co_varnames if isinstance(code, CodeType) else ()


def _table_of(cls: type[nn.Module]) -> Any:
    return getattr(sys.modules[cls.__module__], TABLE)


def _eager_function(cls: type[nn.Module]) -> Any:
    """Return what a layer passes to the table as the function for ``"eager"``."""
    names = names_in_forward(cls)  # type: ignore[arg-type]
    name = next((name for name in names if name.endswith("eager_attention_forward")), "")
    return getattr(sys.modules[cls.__module__], name, None)
