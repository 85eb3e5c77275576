# SPDX-License-Identifier: Apache-2.0
"""Every error that modewright raises on purpose.

::

    ModewrightError
    ├── UnknownModeError       (KeyError)        a mode name that no registry entry bears
    ├── ConfigError            (ValueError)      a config, recipe or argument that does not validate
    ├── MatchError             (ValueError)      a pattern that matched no module
    ├── IncompatibleModeError  (AssertionError)  a mode that may not be applied here
    ├── ApplyModeError         (RuntimeError)    a conversion or restoration that failed
    ├── CheckpointError        (ValueError)      a file that cannot be trusted or read
    ├── DataError              (ValueError)      calibration or evaluation data that is unusable
    ├── ExportError            (RuntimeError)    an export that cannot be written
    ├── SearchError            (RuntimeError)    a search that is unsupported or cannot succeed
    └── KernelError            (RuntimeError)    a kernel that cannot be built or cannot run

The second base is the class under which code written for other tools already catches the same
mistake. Messages have one shape: what was expected, what was received, where, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ModewrightError(Exception):
    """Base of all errors that modewright raises on purpose."""

    def __str__(self) -> str:
        # KeyError would show repr(message); every error here shows the message itself.
        return str(self.args[0]) if self.args else ""


class UnknownModeError(ModewrightError, KeyError):
    """A mode was asked for by a name that is not registered."""


class ConfigError(ModewrightError, ValueError):
    """A config, a recipe or an argument does not validate."""


class MatchError(ModewrightError, ValueError):
    """A pattern matched no module."""


class IncompatibleModeError(ModewrightError, AssertionError):
    """A mode may not be applied to this model now: the order of modes forbids it."""


class ApplyModeError(ModewrightError, RuntimeError):
    """A mode failed while it converted or restored a model.

    Attributes:
        mode: Name of the mode that failed, or ``None`` where no single mode is to blame.
        index: Its place in the sequence that was applied, counted from 0.
    """

    def __init__(self, message: str, *, mode: str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.mode = mode
        self.index = index

    @property
    def cause(self) -> BaseException | None:
        """The error that the mode raised; also the ``__cause__`` of this one."""
        return self.__cause__


class CheckpointError(ModewrightError, ValueError):
    """A checkpoint is damaged, foreign, too new, or does not fit the model."""


class DataError(ModewrightError, ValueError):
    """Calibration or evaluation data is missing or unusable."""


class ExportError(ModewrightError, RuntimeError):
    """A model cannot be exported to the requested target."""


class SearchError(ModewrightError, RuntimeError):
    """A search is not supported by the mode, or its constraints cannot be met."""


class KernelError(ModewrightError, RuntimeError):
    """The own matrix kernel cannot be built, or cannot run; torch's operators serve without it."""


def nearest(
    name: str, candidates: Iterable[str], limit: int = 3, *, likeness: float = 0.4
) -> list[str]:
    """Return up to ``limit`` candidates that look most like ``name``, best first."""
    return get_close_matches(name, list(candidates), n=limit, cutoff=likeness)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `` Did you mean 'a', 'b'?`` or an empty string: the last sentence of a message."""
    found = nearest(name, candidates, likeness=0.6)
    return f" Did you mean {', '.join(repr(c) for c in found)}?" if found else ""
