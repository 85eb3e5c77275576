# SPDX-License-Identifier: Apache-2.0
"""Packed layers that multiply rows by one matrix, and tables that rows are looked up in."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.runtime import backends
from modewright.runtime.layers.base import PackedLayer


class LinearLike(PackedLayer):
    """A product of the input with one matrix, and a branch of low rank beside it."""

    bias: torch.Tensor | None

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """Return what the plain layer computes with the packed weight."""
        raise NotImplementedError

    def branch(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output of the branch of low rank."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        seen = self.transformed_input(input)
        result = self.product(seen)
        if self.low_rank_up is not None:
            result = result + self.branch(seen)
        return self.simulated("output", result)


class PackedLinear(LinearLike):
    """Packed :class:`torch.nn.Linear`: a backend multiplies by the packed weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.product(input) if self.__dict__["is_product"] else super().forward(input)

    def product(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        spec = self.record.activations.get("input")
        weight, bias = self.packed_weight(), self._parameters["bias"]
        if spec is None:
            return backends.linear(weight, input, bias)
        if spec.name is None:
            return backends.linear(weight, self.simulated("input", input), bias)
        scale = self._buffers["input_scale"]
        return backends.linear(weight, input, bias, act=spec.name, act_scale=scale)

    def branch(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        down, up = cast(torch.Tensor, self.low_rank_down), cast(torch.Tensor, self.low_rank_up)
        return F.linear(F.linear(input, down), up)

    def was_packed(self) -> None:
        """Note whether a product is all, with inputs quantized as backends do it or not at all."""
        record = self.record
        others = {*record.transforms, *record.activations} - {"input"}
        spec = record.activations.get("input")
        named = spec is None or spec.name is not None
        self.__dict__["is_product"] = named and not others and not record.hadamard_size


class PackedTransposedLinear(PackedLinear):
    """Packed ``Conv1D`` of Transformers: a linear layer whose plain weight is ``[in, out]``."""

    def branch(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        weight = cast(torch.Tensor, self.branch_weight())
        rows = input.reshape(-1, input.shape[-1])
        return (rows @ weight).view(*input.shape[:-1], weight.shape[1])


class PackedConv(LinearLike):
    """Packed :class:`torch.nn.Conv1d`, ``Conv2d`` and ``Conv3d``: unpacked when it runs."""

    @property
    def feature_axis(self) -> int:  # noqa: D102
        return -len(cast(nn.Conv2d, self).kernel_size) - 1

    def product(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        own: Any = self
        low, weight = self.simulated("input", input), self.quantized_parameter("weight")
        return cast(torch.Tensor, own._conv_forward(low, weight, self.bias))

    def branch(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        own: Any = self
        return cast(torch.Tensor, own._conv_forward(input, self.branch_weight(), None))


class PackedEmbedding(PackedLayer):
    """Packed :class:`torch.nn.Embedding`: only the rows that are looked up are unpacked."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        own = cast(nn.Embedding, self)
        if own.max_norm is not None:  # the table itself is changed by lookups; a copy of it is here
            return cast(torch.Tensor, super().forward(input))
        rows = self.packed_weight().select_rows(input, self.compute_dtype)
        return self.simulated("output", rows)
