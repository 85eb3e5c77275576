# SPDX-License-Identifier: Apache-2.0
"""Packed recurrent layers: the weights of all layers and directions are unpacked when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from modewright.runtime.layers.base import PackedLayer

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedRecurrent(PackedLayer):
    """Packed :class:`torch.nn.LSTM`, ``GRU`` and ``RNN``.

    These keep a list of their weights for the kernel, which is filled only while they run.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        own = cast(nn.LSTM, self)
        try:
            own._flat_weights = [getattr(self, name, None) for name in own._flat_weights_names]
            return super().forward(*args, **kwargs)
        finally:
            self.was_packed()

    def was_packed(self) -> None:
        """Forget the unpacked weights."""
        own = cast(nn.LSTM, self)
        own._flat_weights = [self._parameters.get(name) for name in own._flat_weights_names]
        own._flat_weight_refs = [None] * len(own._flat_weights)

    def _weights_have_changed(self) -> bool:
        """Keep the list as :meth:`forward` fills it."""
        return False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.was_packed()
        return self
