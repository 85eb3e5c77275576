# SPDX-License-Identifier: Apache-2.0
"""Granularity: which values of a tensor share a scale, as a view ``[rows, groups, group]``.

========  =====================================  ======================================
name      what shares a scale                    shape of the scale
========  =====================================  ======================================
tensor    everything                             ``[1, 1]``
channel   one output channel                     ``[channels, 1]``
group     ``group_size`` inputs of one channel   ``[channels, groups]``
block     a tile of channels by inputs           ``[channel tiles, input tiles]``
token     the last axis (one vector)             ``[tokens, 1]``
========  =====================================  ======================================

The inputs of a channel are all of its values, in the order of the remaining axes: of a
convolution, input channels by kernel. With ``channel_axis=None`` a tensor has tokens instead of
channels: ``group`` then means ``group_size`` neighbours on the last axis, and a tile is so many
tokens high. A last group or tile that is not full is padded with zeros, which never widen a range
that includes zero. A tensor without axes is one value on one axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F  # noqa: N812

Granularity = Literal["tensor", "channel", "group", "block", "token"]


@dataclass(frozen=True)
class Grouping:
    """How one tensor is cut into groups, and put together again.

    Attributes:
        granularity: What shares a scale.
        group_size: Values in a group; only for ``"group"``.
        channel_axis: The axis of output channels; ``None`` for a tensor of tokens.
        block_size: Channels and inputs in a tile; only for ``"block"``.
    """

    granularity: Granularity
    group_size: int | None = None
    channel_axis: int | None = 0
    block_size: tuple[int, int] | None = None

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as ``[rows, groups, group]``; a view where it can be one."""
        if self.granularity == "tensor":
            return tensor.reshape(1, 1, -1)
        rows = self._rows(tensor)
        if self.granularity in ("channel", "token"):
            return rows.unsqueeze(1)
        high, wide = self._tile(rows.shape[1])
        rows = _padded(rows, -rows.shape[0] % high, -rows.shape[1] % wide)
        tiles = rows.reshape(rows.shape[0] // high, high, rows.shape[1] // wide, wide)
        return tiles.transpose(1, 2).flatten(2)

    def join(self, grouped: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return a tensor of ``shape`` from its groups: the inverse of :meth:`split`."""
        if self.granularity == "tensor":
            return grouped.reshape(shape)
        if self.granularity in ("channel", "token"):
            rows = grouped.squeeze(1)
        else:
            tall, across = grouped.shape[:2]
            high, wide = self._tile(grouped.shape[2])
            tiles = grouped.reshape(tall, across, high, wide).transpose(1, 2)
            rows = tiles.reshape(tall * high, across * wide)
        if self.channel_axis is None or self.granularity == "token" or not shape:
            width = shape[-1] if shape else 1
            return rows[: shape[:-1].numel(), :width].reshape(shape)
        axis = self.channel_axis % len(shape)
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        width = shape.numel() // max(shape[axis], 1)
        return rows[: shape[axis], :width].reshape(moved).movedim(0, axis)

    def scale_shape(self, shape: torch.Size) -> tuple[int, int]:
        """Return ``(rows, groups)`` for a tensor of ``shape``."""
        empty = torch.empty(shape, device="meta")
        rows, groups, _ = self.split(empty).shape
        return rows, groups

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as ``[channels or tokens, values]``."""
        if not tensor.ndim:
            return tensor.reshape(1, 1)
        if self.channel_axis is None or self.granularity == "token":
            return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
        channels = tensor.shape[self.channel_axis]
        rows = tensor.movedim(self.channel_axis, 0)
        return rows.reshape(channels, tensor.numel() // max(channels, 1))

    def _tile(self, width: int) -> tuple[int, int]:
        """Return height and width of what shares a scale, in rows of ``width`` values."""
        if self.granularity == "block" and self.block_size is not None:
            return self.block_size
        return 1, self.group_size or max(width, 1)


def _padded(rows: torch.Tensor, below: int, right: int) -> torch.Tensor:
    return F.pad(rows, (0, right, 0, below)) if below or right else rows
