# SPDX-License-Identifier: Apache-2.0
"""Layers that multiply rows by one matrix, and tables that rows are looked up in."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.quantization.layers.base import QuantizedLayer
from modewright.quantization.representation import SchemeConfig


class LinearLike(QuantizedLayer):
    """A product of the input with one matrix: scale, rotation and branch are honoured."""

    bias: torch.Tensor | None

    @property
    def has_rows(self) -> bool:  # noqa: D102
        return True

    def product(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return what the plain layer computes from these."""
        raise NotImplementedError

    def branch(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output of the low-rank branch."""
        return self.product(input, cast(torch.Tensor, self._branch()), None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        seen = self.transformed_input(input)
        low = seen if self.input_quantizer is None else self.input_quantizer(seen)
        result = self.product(low, self.quantized_weight(), self.bias)
        if self.low_rank_up is not None:
            result = result + self.branch(seen)
        return self.quantized_output(result)

    def input_rows(self, x: torch.Tensor) -> torch.Tensor | None:  # noqa: D102
        return x.detach().float().reshape(-1, x.shape[-1])


class LinearForward(LinearLike):
    """Quantized :class:`torch.nn.Linear`."""

    def product(  # noqa: D102
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return F.linear(input, weight, bias)

    def branch(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        down = cast(torch.Tensor, self.low_rank_down)
        return F.linear(F.linear(input, down), cast(torch.Tensor, self.low_rank_up))


class TransposedLinearForward(LinearLike):
    """Quantized ``transformers.pytorch_utils.Conv1D``: a linear layer with a weight [in, out]."""

    channel_axis = 1

    def product(  # noqa: D102
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows = input.reshape(-1, input.shape[-1])
        result = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        return result.view(*input.shape[:-1], weight.shape[1])


class BilinearForward(QuantizedLayer):
    """Quantized :class:`torch.nn.Bilinear`; its first input passes through the quantizer."""


class _TableForward(QuantizedLayer):
    """A table that indices look rows up in: the input has no precision."""

    by_default = False

    @classmethod
    def fitted(cls, module: nn.Module, scheme: SchemeConfig) -> SchemeConfig:
        fitted = super().fitted(module, scheme)
        return fitted.model_copy(update={"input_activations": None})


class EmbeddingForward(_TableForward):
    """Quantized :class:`torch.nn.Embedding`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        own = cast(nn.Embedding, self)
        result = F.embedding(
            input,
            self.quantized_weight(),
            own.padding_idx,
            own.max_norm,
            own.norm_type,
            own.scale_grad_by_freq,
            own.sparse and self.weight_quantizer is None,  # it passes no sparse gradient on
        )
        return self.quantized_output(result)


class EmbeddingBagForward(_TableForward):
    """Quantized :class:`torch.nn.EmbeddingBag`."""

    def forward(  # noqa: D102
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        own: Any = self
        result = F.embedding_bag(
            input,
            self.quantized_weight(),
            offsets,
            own.max_norm,
            own.norm_type,
            own.scale_grad_by_freq,
            own.mode,
            own.sparse and self.weight_quantizer is None,
            per_sample_weights,
            own.include_last_offset,
            own.padding_idx,
        )
        return self.quantized_output(result)


class RouterForward(QuantizedLayer):
    """Quantized router of a mixture of experts, where a pattern names it.

    Small, and what it decides is discrete: it is left alone otherwise.
    """
