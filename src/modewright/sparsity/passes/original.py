# SPDX-License-Identifier: Apache-2.0
"""``Original``: the network as it was before a mode began, in the modules that it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from modewright.layers.masks import without_masks


class Original:
    """Remembers the parameters of a model, to run it as it was.

    Parameters that are replaced afterwards stay in memory as long as this does. As an argument for
    the block driver it is a function that returns a context.

    Args:
        model: The model, before anything is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {module: dict(module._parameters) for module in model.modules()}

    def weight(self, module: nn.Module, name: str) -> nn.Parameter:
        """Return a parameter as it was."""
        return cast(nn.Parameter, self._parameters[module][name])

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[None]:
        """Let a module of the model compute what it did."""
        parts = [(part, dict(part._parameters)) for part in module.modules()]
        with without_masks(module):
            try:
                for part, _ in parts:
                    part._parameters.update(self._parameters[part])
                yield
            finally:
                for part, own in parts:
                    part._parameters.update(own)
