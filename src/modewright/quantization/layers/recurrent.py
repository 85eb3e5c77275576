# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers: every weight of every layer and direction, and the input sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from modewright.quantization.layers.base import QuantizedLayer


class RecurrentForward(QuantizedLayer):
    """Quantized :class:`torch.nn.LSTM`, ``GRU`` and ``RNN``.

    The hidden state between two steps lies inside the kernel and keeps its precision.
    """

    @classmethod
    def parameter_names(cls, module: nn.Module) -> tuple[str, ...]:  # noqa: D102
        names: list[str] = cast(nn.LSTM, module)._flat_weights_names
        return tuple(name for name in names if name.startswith("weight"))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Also put the quantized weights into the list that the kernel takes."""
        own = cast(nn.LSTM, self)
        kept = own._flat_weights, own._flat_weight_refs
        with super().reading():
            own._flat_weights = [getattr(own, name, None) for name in own._flat_weights_names]
            try:
                yield
            finally:
                own._flat_weights, own._flat_weight_refs = kept


class RecurrentCellForward(QuantizedLayer):
    """Quantized :class:`torch.nn.LSTMCell`, ``GRUCell`` and ``RNNCell``."""

    @classmethod
    def parameter_names(cls, module: nn.Module) -> tuple[str, ...]:  # noqa: D102
        return ("weight_ih", "weight_hh")
