# SPDX-License-Identifier: Apache-2.0
"""Patterns -> modules, and which patterns matched nothing.

A pattern is one of

* a module's path, with ``*``, ``?`` and ``[...]`` as in a shell; ``*`` also crosses dots:
  ``"*.down_proj"``, ``"model.layers.[0-3].*"``;
* the name of a class, which matches its instances and those of its subclasses: ``"Linear"``,
  ``"nn.Conv2d"``;
* ``"re:"`` and a regular expression that must match a module's whole path.

A pattern that matches nothing is never dropped: the caller gets it back, or an error that names the
nearest modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from modewright.errors import ConfigError, MatchError, nearest

_REGEX = "re:"


@dataclass(frozen=True)
class Matches:
    """What patterns matched.

    Attributes:
        by_pattern: For each pattern, the paths it matched, in the order of the model.
    """

    by_pattern: dict[str, tuple[str, ...]]

    @property
    def names(self) -> frozenset[str]:
        """The paths that any pattern matched."""
        return frozenset(name for names in self.by_pattern.values() for name in names)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The patterns that matched nothing."""
        return tuple(p for p, names in self.by_pattern.items() if not names)


def match_modules(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> Matches:
    """Match every pattern against every module.

    Args:
        modules: Modules by path, as ``dict(model.named_modules())`` gives them.
        patterns: The patterns.

    Raises:
        ConfigError: A regular expression is malformed.
    """
    found = {}
    for pattern in patterns:
        matches = _matcher(pattern)
        found[pattern] = tuple(name for name, m in modules.items() if name and matches(name, m))
    return Matches(found)


def require_matches(
    modules: Mapping[str, nn.Module], patterns: Sequence[str], what: str
) -> Matches:
    """Match like :func:`match_modules`, and demand that every pattern matches something.

    Args:
        modules: Modules by path.
        patterns: The patterns.
        what: Where the patterns come from, for the message ("`ignore` of mode 'quantize'").

    Raises:
        MatchError: A pattern matched nothing; the message names the nearest modules.
        ConfigError: A regular expression is malformed.
    """
    matches = match_modules(modules, patterns)
    if matches.unmatched:
        lines = [f"  {p!r}{_nearest(p, modules)}" for p in matches.unmatched]
        raise MatchError(
            f"{what}: no module matches\n" + "\n".join(lines) + "\nA pattern is a module path "
            "(with * and ?), a class name such as 'Linear', or 're:' and a regular expression."
        )
    return matches


def _matcher(pattern: str) -> Callable[[str, nn.Module], bool]:
    if pattern.startswith(_REGEX):
        try:
            expression = re.compile(pattern[len(_REGEX) :])
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"The pattern {pattern!r} is no regular expression: {error}"
            ) from error
        return lambda name, module: expression.fullmatch(name) is not None
    class_name = _without_package(pattern)
    return lambda name, module: (
        fnmatchcase(name, pattern) or class_name in _class_names(type(module))
    )


def _without_package(pattern: str) -> str:
    return pattern.removeprefix("torch.").removeprefix("nn.")


def _class_names(cls: type) -> list[str]:
    """Return the names of a module's class and its bases, up to ``nn.Module``."""
    return [base.__name__ for base in cls.__mro__ if issubclass(base, nn.Module)][:-1] or [
        cls.__name__
    ]


def _nearest(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """Return `` (nearest: ...)`` with the paths and classes that look most like the pattern."""
    wanted = _without_package(pattern.removeprefix(_REGEX))
    paths = [name for name in modules if name]
    words = {cls: cls for path in paths for cls in _class_names(type(modules[path]))}
    for path in paths:  # the last part of a path stands for the first path that ends so
        words.setdefault(path.rpartition(".")[2], path)
    last = wanted.rpartition(".")[2].strip("*?$^")
    found = [words[word] for word in nearest(last, words)]
    if last != wanted.lstrip("*."):
        found = nearest(wanted, paths) + found
    unique = list(dict.fromkeys(found))[:3]
    return f" (nearest: {', '.join(repr(n) for n in unique)})" if unique else ""
