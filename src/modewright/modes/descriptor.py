# SPDX-License-Identifier: Apache-2.0
"""``ModeDescriptor``: everything the engine needs to know about one mode.

A descriptor is written with class attributes and methods::

    class Halve(ModeDescriptor[HalveConfig]):
        name = "halve"
        config_class = HalveConfig

        def convert(self, model, config):
            ...
            return model, {"halved": names}

        def restore(self, model, config, metadata):
            ...
            return model

or with an ``@property`` for each member that returns the value or the callable; the engine only
ever reads ``descriptor.name``, ``descriptor.convert(...)`` and so on, so both are the same to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from modewright.errors import IncompatibleModeError, SearchError, UnknownModeError
from modewright.modes.config import ModeConfig

if TYPE_CHECKING:
    from torch import nn

    from modewright.modes.registry import ModeRegistry
    from modewright.modes.searcher import BaseSearcher

Metadata = dict[str, Any]
C = TypeVar("C", bound=ModeConfig)


class ModeDescriptor(ABC, Generic[C]):
    """One mode: a recorded step that changes a model and can be rebuilt from its record."""

    # Set by the registry that holds this descriptor; used to look up a mode given by name.
    _registry: ModeRegistry | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The name under which the mode is registered and recorded."""

    @property
    @abstractmethod
    def config_class(self) -> type[C]:
        """The subclass of :class:`ModeConfig` that validates this mode's config."""

    @abstractmethod
    def convert(
        self, model: nn.Module, config: C, *args: Any, **mode_kwargs: Any
    ) -> tuple[nn.Module | None, Metadata] | tuple[nn.Module | None, C, Metadata]:
        """Change the model; return it and the metadata from which :meth:`restore` rebuilds it.

        Replace parameters and buffers (``module.weight = nn.Parameter(new)``), do not write into
        them; a mode that must write into them leaves :attr:`writes_in_place` at ``True``.

        Args:
            model: The module to change, in place or by returning another one; the
                :class:`~modewright.modes.model_like.ModelLike` itself if
                :attr:`require_model_like`.
            config: The validated config. It is frozen: to record another one, return
                ``(model, config, metadata)``.
            args: Nothing; there so that a mode may name the keywords it takes.
            mode_kwargs: What must not be recorded: data, loss functions, loaders.

        Returns:
            ``(model, metadata)`` or ``(model, config, metadata)``. Metadata holds JSON values and
            tensors only, and everything the mode drew or measured. ``None`` in place of the model
            says that the conversion failed.
        """

    @abstractmethod
    def restore(self, model: nn.Module, config: C, metadata: Metadata) -> nn.Module | None:
        """Rebuild what :meth:`convert` made from an unmodified model: no data, no search, no draw.

        Parameters and buffers must come out with the right names, shapes and dtypes; their values
        are loaded afterwards. ``None`` says that it failed.
        """

    @property
    def summary(self) -> str:
        """One line that says what the mode does, for lists; the docstring's first line."""
        return (type(self).__doc__ or "").strip().split("\n")[0]

    @property
    def technique(self) -> str:
        """The technique this mode belongs to ("quantization", "pruning" ...), or ``""``."""
        return ""

    @property
    def next_modes(self) -> Set[str] | None:
        """Names of the modes one of which must follow; empty: none may; ``None``: any may."""
        return None

    @property
    def next_prohibited_modes(self) -> Set[str] | None:
        """Names of modes that must not follow while this mode is in force; ``None``: no check."""
        return None

    @property
    def export_mode(self) -> str | None:
        """The mode that later closes this one (fixes the subnet, folds the quantizers ...)."""
        return None

    @property
    def is_export_mode(self) -> bool:
        """Whether this mode closes another one."""
        return False

    @property
    def closes(self) -> Set[str]:
        """Modes that this export mode closes too, although they name another one for that."""
        return frozenset()

    @property
    def requires(self) -> Set[str]:
        """Traits that must hold before this mode."""
        return frozenset()

    @property
    def provides(self) -> Set[str]:
        """Traits that hold after this mode."""
        return frozenset()

    @property
    def removes(self) -> Set[str]:
        """Traits that no longer hold after this mode."""
        return frozenset()

    @property
    def forbids(self) -> Set[str]:
        """Traits that must not hold before this mode."""
        return frozenset()

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why traits are forbidden, by trait: what an error adds to saying that they are."""
        return {}

    @property
    def search_algorithm(self) -> type[BaseSearcher]:
        """The searcher that picks a subnet of what this mode opens.

        Raises:
            SearchError: This mode has no search.
        """
        raise SearchError(
            f"Mode {self.name!r} has no search: it does not define `search_algorithm`. "
            "`modewright modes` shows which modes have one."
        )

    @property
    def require_model_like(self) -> bool:
        """Whether ``convert`` wants the recipe (class, args, kwargs) and not a built module."""
        return False

    @property
    def save_mode_in_state(self) -> bool:
        """``False`` for a mode that is applied again by hand each time and never saved."""
        return True

    @property
    def writes_in_place(self) -> bool:
        """Whether ``convert`` may write into tensors that exist.

        ``True``, the safe default, makes the engine copy parameters and buffers first so that a
        failure can be undone. A mode that only replaces tensors says ``False`` and costs nothing.
        """
        return True

    @property
    def uses_calibration(self) -> bool:
        """Whether ``convert`` takes ``calibration`` (batches) and ``on_batch`` (for progress)."""
        return False

    @property
    def resumes(self) -> bool:
        """Whether ``convert`` takes ``checkpoint``, a folder from which it goes on if killed."""
        return False

    def update_for_new_mode(self, model: nn.Module, config: C, metadata: Metadata) -> None:
        """Edit config and metadata in place, just before another mode is added after this one."""

    def update_for_save(self, model: nn.Module, config: C, metadata: Metadata) -> None:
        """Edit (copies of) config and metadata in place when the state is read for saving."""

    def preview(self, model: nn.Module, config: C) -> Sequence[str]:
        """Return lines that say what ``convert`` would do to ``model``; must not change it.

        Raises:
            MatchError: A pattern of the config matches nothing in this model.
        """
        del model, config
        return ()

    def assert_compatibility_as_next_mode_of(self, other: ModeDescriptor[Any] | str) -> None:
        """Check by the names that ``other`` declares that this mode may follow it.

        Args:
            other: The mode before this one: a descriptor, or a name in this mode's registry.

        Raises:
            IncompatibleModeError: ``other`` does not let this mode follow.
            UnknownModeError: ``other`` is a name that cannot be looked up.
        """
        if isinstance(other, str):
            if self._registry is None:
                raise UnknownModeError(
                    f"Mode {other!r} cannot be looked up by name: {self!r} is not registered. "
                    "Pass the descriptor, or register this mode first."
                )
            other = self._registry[other]
        allowed, prohibited = other.next_modes, other.next_prohibited_modes
        if allowed is not None and self.name not in allowed:
            may = f"only {', '.join(repr(n) for n in sorted(allowed))}" if allowed else "nothing"
            raise IncompatibleModeError(
                f"Mode {self.name!r} cannot follow {other.name!r}: {may} may follow it."
            )
        if prohibited is not None and self.name in prohibited:
            raise IncompatibleModeError(
                f"Mode {self.name!r} cannot follow {other.name!r}, which prohibits it."
            )

    def __str__(self) -> str:
        """Return the mode's name."""
        return self.name

    def __repr__(self) -> str:
        """Return ``<ClassName 'name'>``."""
        return f"<{type(self).__name__} {self.name!r}>"
