# SPDX-License-Identifier: Apache-2.0
"""Granularity: which values of a tensor share a scale, as a view ``[rows, groups, group]``.

========  =====================================  =====================
name      what shares a scale                    shape of the scale
========  =====================================  =====================
tensor    everything                             ``[1, 1]``
channel   one output channel                     ``[channels, 1]``
group     ``group_size`` inputs of one channel   ``[channels, groups]``
token     the last axis (one vector)             ``[tokens, 1]``
========  =====================================  =====================

A last group that is not full is padded with zeros, which never widen a range that includes zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F  # noqa: N812

Granularity = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class Grouping:
    """How one tensor is cut into groups, and put together again.

    Attributes:
        granularity: What shares a scale.
        group_size: Values in a group; only for ``"group"``.
        channel_axis: The axis of output channels; only for ``"channel"`` and ``"group"``.
    """

    granularity: Granularity
    group_size: int | None = None
    channel_axis: int = 0

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as ``[rows, groups, group]``; a view where it can be one."""
        if self.granularity == "tensor":
            return tensor.reshape(1, 1, -1)
        if self.granularity == "token":
            return tensor.reshape(tensor.shape[:-1].numel(), 1, tensor.shape[-1])
        channels = tensor.shape[self.channel_axis]
        rows = tensor.movedim(self.channel_axis, 0)
        rows = rows.reshape(channels, tensor.numel() // max(channels, 1))
        if self.granularity == "channel" or self.group_size is None:
            return rows.unsqueeze(1)
        padding = -rows.shape[1] % self.group_size
        if padding:
            rows = F.pad(rows, (0, padding))
        return rows.reshape(channels, rows.shape[1] // self.group_size, self.group_size)

    def join(self, grouped: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return a tensor of ``shape`` from its groups: the inverse of :meth:`split`."""
        if self.granularity in ("tensor", "token"):
            return grouped.reshape(shape)
        axis = self.channel_axis % len(shape)
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        width = shape.numel() // max(shape[axis], 1)
        return grouped.flatten(1)[:, :width].reshape(moved).movedim(0, axis)
