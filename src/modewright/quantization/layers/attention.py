# SPDX-License-Identifier: Apache-2.0
"""``nn.MultiheadAttention``.

Its own forward hands the weights of all projections to one kernel. Here ``out_proj`` is called, as
a layer with quantizers of its own.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.quantization.layers.base import QuantizedLayer, make_quantizer
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import SchemeConfig

_INPUTS = ("key_input_quantizer", "value_input_quantizer")  # that of the query is input_quantizer


class MultiheadAttentionForward(QuantizedLayer):
    """Quantized :class:`torch.nn.MultiheadAttention`: its input projections."""

    key_input_quantizer: Quantizer | None
    value_input_quantizer: Quantizer | None

    @classmethod
    def parameter_names(cls, module: nn.Module) -> tuple[str, ...]:  # noqa: D102
        if cast(nn.MultiheadAttention, module)._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    def add_quantizers(self, scheme: SchemeConfig) -> None:  # noqa: D102
        super().add_quantizers(scheme)
        for name in _INPUTS:
            setattr(self, name, make_quantizer(scheme.input_activations))

    def forward(  # noqa: D102
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        own = cast(nn.MultiheadAttention, self)
        turned = own.batch_first and query.dim() == 3
        query, key, value = self._quantized_inputs(query, key, value)
        if turned:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        weights = {n: self.quantized_parameter(n) for n in type(self).parameter_names(self)}
        called = isinstance(own.out_proj, QuantizedLayer)
        eye = torch.eye(own.embed_dim, dtype=query.dtype, device=query.device)
        output, attention = F.multi_head_attention_forward(
            query,
            key,
            value,
            own.embed_dim,
            own.num_heads,
            weights.get("in_proj_weight"),
            own.in_proj_bias,
            own.bias_k,
            own.bias_v,
            own.add_zero_attn,
            own.dropout,
            eye if called else own.out_proj.weight,
            None if called else own.out_proj.bias,
            training=own.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not own._qkv_same_embed_dim,
            q_proj_weight=weights.get("q_proj_weight"),
            k_proj_weight=weights.get("k_proj_weight"),
            v_proj_weight=weights.get("v_proj_weight"),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if called:
            output = own.out_proj(output)
        if turned:
            output = output.transpose(0, 1)
        return self.quantized_output(output), attention

    def _quantized_inputs(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the three inputs; each has a range of its own, so each has its quantizer."""
        quantizers = (self.input_quantizer, self.key_input_quantizer, self.value_input_quantizer)
        pairs = zip(quantizers, (query, key, value), strict=True)
        return [tensor if quantizer is None else quantizer(tensor) for quantizer, tensor in pairs]
