# SPDX-License-Identifier: Apache-2.0
"""Tables of modes and recipes. Imports no torch: these lists must come at once."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.traits import trait_names

if TYPE_CHECKING:
    from modewright.modes.registry import ModeRegistry
    from modewright.recipes.schema import Recipe


def modes_table(registry: ModeRegistry) -> Table:
    """Return all modes with a line on each; plug-ins that are not loaded show their package."""
    table = Table("mode", "what it does")
    for name in registry:
        summary = registry.listed_summary(name) or f"from {registry.owner(name)}"
        table.add_row(escape(name), escape(summary))
    return table


def mode_data(mode: ModeDescriptor[Any]) -> dict[str, Any]:
    """Return what a mode declares, as JSON data."""
    return {
        "name": mode.name,
        "technique": mode.technique,
        "summary": mode.summary,
        "config": _fields(mode.config_class),
        "types": {cls.__name__: _fields(cls) for cls in _nested(mode.config_class)},
        "next_modes": None if mode.next_modes is None else sorted(mode.next_modes),
        "next_prohibited_modes": sorted(mode.next_prohibited_modes or ()),
        "export_mode": mode.export_mode,
        "is_export_mode": mode.is_export_mode,
        "closes": sorted(mode.closes),
        "requires": trait_names(frozenset(mode.requires)),
        "provides": trait_names(frozenset(mode.provides)),
        "removes": trait_names(frozenset(mode.removes)),
        "forbids": trait_names(frozenset(mode.forbids)),
        "has_search": _has_search(mode),
    }


def mode_tables(mode: ModeDescriptor[Any]) -> list[Table]:
    """Return the tables of one mode: its config fields, what these consist of, and its rules."""
    data = mode_data(mode)
    tables = [_fields_table(data["summary"], data["config"])]
    tables += [_fields_table(f"a {name} has", rows) for name, rows in data["types"].items()]
    rules = Table(show_header=False)
    rules.add_row("exported by", data["export_mode"] or "nothing")
    rules.add_row("exports another mode", "yes" if data["is_export_mode"] else "no")
    following = data["next_modes"]
    rules.add_row("may be followed by", "any mode" if following is None else ", ".join(following))
    rules.add_row("must not be followed by", ", ".join(data["next_prohibited_modes"]) or "-")
    for member in ("requires", "forbids", "provides", "removes"):
        rules.add_row(member, ", ".join(data[member]) or "-")
    rules.add_row("has a search", "yes" if data["has_search"] else "no")
    return [*tables, rules]


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """Return all recipes with their modes."""
    table = Table("recipe", "modes", "what it does")
    for recipe in recipes:
        modes = " > ".join(step.mode for step in recipe.steps)
        table.add_row(escape(recipe.name), escape(modes), escape(recipe.summary))
    return table


def _has_search(mode: ModeDescriptor[Any]) -> bool:
    """Whether a mode defines a search; the searcher itself, which needs torch, is not loaded."""
    return type(mode).search_algorithm is not ModeDescriptor.search_algorithm


def _fields(cls: type[BaseModel]) -> list[dict[str, str]]:
    return [
        {
            "field": name,
            "type": _type_name(info.annotation),
            "default": "(required)"
            if info.is_required()
            else repr(info.get_default(call_default_factory=True)),
            "description": info.description or "",
        }
        for name, info in cls.model_fields.items()
    ]


def _fields_table(title: str, rows: list[dict[str, str]]) -> Table:
    table = Table("field", "type", "default", "description", title=escape(title))
    for row in rows:
        table.add_row(*(escape(row[k]) for k in ("field", "type", "default", "description")))
    if not rows:
        table.add_row("", "", "", "there is nothing to set")
    return table


def _nested(cls: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the settings that a config consists of, each once, outermost first."""
    found: dict[type[BaseModel], None] = {}
    waiting: list[Any] = [info.annotation for info in cls.model_fields.values()]
    while waiting:
        annotation = waiting.pop(0)
        if isinstance(annotation, type) and not typing.get_args(annotation):
            if issubclass(annotation, BaseModel) and annotation not in found:
                found[annotation] = None
                waiting += [info.annotation for info in annotation.model_fields.values()]
        else:
            waiting += typing.get_args(annotation)
    return list(found)


def _type_name(annotation: Any) -> str:
    """Return a type as one would write it, without module names."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    text = str(annotation).replace("typing.", "").replace("NoneType", "None")
    text = re.sub(r"Optional\[(.+)\]$", r"\1 | None", text)
    text = re.sub(r"Annotated\[(\w+),[^\]]*\]", r"\1", text)
    return re.sub(r"modewright(\.\w+)*\.", "", text)
