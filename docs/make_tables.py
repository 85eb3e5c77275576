# SPDX-License-Identifier: Apache-2.0
"""Writes the generated tables into README.md and the pages of docs/.

A table lies between ``<!-- table: NAME -->`` and ``<!-- /table -->``. The names are the keys of
``TABLES``; ``config MODE`` is the table of one mode's config fields. Run it after a change to a
mode, a scheme, a format or a recipe::

    python docs/make_tables.py           write
    python docs/make_tables.py --check   exit with 1 if a page is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modewright.builtin_modes import BUILTIN_MODES
from modewright.formats.catalogue import FORMATS, code_values
from modewright.formats.floating import FloatFormat
from modewright.modes.registry import ModeRegistry
from modewright.modes.traits import Trait, trait_names
from modewright.quantization.planning import describe_scheme
from modewright.quantization.schemes import SCHEMES
from modewright.recipes.loader import load_recipe, recipe_names
from modewright.recipes.schema import Checks, Recipe, RecipeStep, SearchPart, TextData
from modewright.reports.modes import mode_data

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

# Not the default registry: a page must not depend on the plug-ins that are installed.
REGISTRY = ModeRegistry(BUILTIN_MODES)


def modes() -> str:
    """Every built-in mode and what it declares."""
    rows = []
    for name, mode in REGISTRY.items():
        data = mode_data(mode)
        traits = [", ".join(f"`{t}`" for t in data[m]) for m in ("requires", "provides", "removes")]
        closers = [data["export_mode"]] if data["export_mode"] else []
        closers += [other for other, mode in REGISTRY.items() if name in mode.closes]
        closed_by = ", ".join(f"`{closer}`" for closer in closers)
        rows.append([f"`{name}`", data["summary"], *traits, closed_by])
    return _table(["mode", "what it does", "requires", "provides", "removes", "closed by"], rows)


def schemes() -> str:
    """Every named scheme in words."""
    rows = [[f"`{name}`", describe_scheme(scheme)] for name, scheme in SCHEMES.items()]
    return _table(["scheme", "what it means"], rows)


def formats() -> str:
    """Every number format and what it can hold."""
    rows = []
    for name, fmt in FORMATS.items():
        layout, normal = "", ""
        if isinstance(fmt, FloatFormat):
            layout = f"{fmt.exponent_bits} + {fmt.mantissa_bits}"
            normal = f"{fmt.smallest_normal:.7g}"
        smallest = min(value for value in code_values(fmt) if value > 0)
        ends = [f"{value:.7g}" for value in (fmt.max_value, fmt.min_value, smallest)]
        rows.append([f"`{name}`", str(fmt.num_bits), layout, *ends, normal])
    head = ["format", "bits", "exponent + mantissa", "largest", "lowest", "smallest above zero"]
    return _table([*head, "smallest normal"], rows)


def recipes() -> str:
    """Every recipe of the library."""
    rows = []
    for recipe in map(load_recipe, recipe_names()):
        steps = " → ".join(f"`{step.mode}`" for step in recipe.steps)
        rows.append([f"`{recipe.name}`", steps, recipe.summary])
    return _table(["recipe", "modes", "what it does"], rows)


def traits() -> str:
    """Every trait and the built-in modes that give and take it."""
    rows = []
    for trait in Trait:
        members = ("provides", "removes", "requires", "forbids")
        users = [_modes_where(member, trait) for member in members]
        if any(users):
            rows.append([f"`{trait.value}`", *users])
    return _table(["trait", "provided by", "removed by", "required by", "forbidden by"], rows)


def recipe_fields() -> str:
    """Every field of a recipe."""
    parts: dict[tuple[str, ...], type[BaseModel]] = {
        ("",): Recipe,
        ("steps[].", "fallback[]."): RecipeStep,
        ("steps[].search.",): SearchPart,
        ("calibration.", "evaluation."): TextData,
        ("checks.",): Checks,
    }
    rows = []
    for prefixes, part in parts.items():
        for name, info in part.model_fields.items():
            names = ", ".join(f"`{prefix}{name}`" for prefix in prefixes)
            default = "required" if info.is_required() else _short(info)
            rows.append([names, default, info.description or ""])
    return _table(["field", "default", "meaning"], rows)


def quality() -> str:
    """What recipes and other tools cost and lose, from the results of the benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from quality import table

    return f"{table(ROOT / 'benchmarks' / 'results')}\n"


def auto_quantize() -> str:
    """What mixed precision and uniform schemes lose, from the results of the benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from auto_quantize import table

    return f"{table(ROOT / 'benchmarks' / 'results' / 'auto_quantize')}\n"


def sparsity() -> str:
    """What zeros cost, from the results of the benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from sparsity import table

    return f"{table(ROOT / 'benchmarks' / 'results' / 'sparsity')}\n"


def pruning() -> str:
    """What pruning a language model costs, from the results of the benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from pruning_lm import table

    return f"{table(ROOT / 'benchmarks' / 'results' / 'pruning')}\n"


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "auto quantize": auto_quantize,
    "sparsity": sparsity,
    "pruning": pruning,
    "modes": modes,
    "schemes": schemes,
    "formats": formats,
    "recipes": recipes,
    "traits": traits,
    "recipe fields": recipe_fields,
}


def config(mode: str) -> str:
    """Every field of one mode's config."""
    rows = [
        [f"`{row['field']}`", f"`{row['type']}`", f"`{row['default']}`", row["description"]]
        for row in mode_data(REGISTRY[mode])["config"]
    ]
    return _table(["field", "type", "default", "meaning"], rows)


def pages() -> list[Path]:
    """Return every page that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """Return a page with all of its tables as they are now."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        make = TABLES.get(name)
        table = config(name.removeprefix("config ")) if make is None else make()
        return f"{match[1]}{table}{match[4]}"

    return TABLE.sub(replace, text)


def _modes_where(member: str, trait: Trait) -> str:
    found = [
        n for n, m in REGISTRY.items() if trait.value in trait_names(frozenset(getattr(m, member)))
    ]
    return ", ".join(f"`{name}`" for name in found)


def _short(info: FieldInfo) -> str:
    """Return a default; of settings only what differs from their own defaults."""
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return ", ".join(f"`{k}: {v}`" for k, v in changed.items())
    return "" if value in (None, "", (), {}) else f"`{value}`"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Write all pages, or with ``--check`` say which are out of date."""
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = renewed(text)
        if new != text:
            stale.append(page)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: tables {'are stale' if '--check' in sys.argv else 'new'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
